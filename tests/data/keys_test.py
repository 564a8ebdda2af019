"""One spelling of keys, whoever wrote them."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from mlcd_jax.data import keys

TEXT = ['a', None, 'été/1', '日本']
BYTES = [b'a', b'', 'été/1'.encode(), '日本'.encode()]


@pytest.mark.parametrize(
  'column',
  [
    pa.array(TEXT),
    pa.array(TEXT, pa.large_string()),
    pa.array(TEXT, pa.string_view()),
    pa.array([t and t.encode() for t in TEXT], pa.binary()),
    pa.array([t and t.encode() for t in TEXT], pa.large_binary()),
    pa.array(TEXT).dictionary_encode(),
    pa.chunked_array([TEXT[:2], TEXT[2:]]),
    pa.array(['x', *TEXT, 'y'])[1:-1],
    TEXT,
    [t and t.encode() for t in TEXT],
    [t and f'./{t}' for t in TEXT],
    [t and unicodedata.normalize('NFD', t) for t in TEXT],
  ],
)
def test_all_types_are_spelled_alike(column):
  found = keys.spell(column)
  assert found.dtype.kind == 'S' and found.tolist() == BYTES
  assert keys.spell(found).tolist() == BYTES


@pytest.mark.parametrize(
  ('column', 'expected'),
  [
    (pa.array([7, None, -1], pa.int64()), [b'7', b'', b'-1']),
    (pa.array([7, 2**64 - 1], pa.uint64()), [b'7', b'18446744073709551615']),
    (pa.array([7.0, None]), [b'7', b'']),  # As pandas reads 7 and a null.
    (np.arange(2), [b'0', b'1']),
    (pa.array([b'ab', b'cd'], pa.binary(2)), [b'ab', b'cd']),
    ([], []),
    (pa.chunked_array([], pa.string()), []),
  ],
)
def test_numbers_and_nothing(column, expected):
  assert keys.spell(column).tolist() == expected


@pytest.mark.parametrize(
  ('key', 'expected'),
  [
    (b'caf\xe9', rb'caf\xe9'),
    ('caf\udce9', rb'caf\xe9'),  # As Python reads the name of such a file.
    (b'\xff\xfe/1', rb'\xff\xfe/1'),
    ('a\nb\x00', rb'a\x0ab\x00'),
    ('a\u2028b', rb'a\x2028b'),
    ('\ud800', rb'\xed\xa0\x80'),
    ('././a', b'a'),
    ('.a', b'.a'),
    ('../a', b'../a'),
  ],
)
def test_what_is_no_text_is_printable(key, expected):
  for others in ([], ['é'], ['plain'], ['x' * 999]):
    found = keys.spell([key, *others])
    assert found[0] == expected
    assert keys.spell(found)[0] == expected


@pytest.mark.parametrize('key', ['x' * 100_000, 'é' * 9_999, 'a/' * 5_000])
def test_long_keys_widen_nothing(key):
  found = keys.spell([key, key + '!', 'short', f'./{key}', key.encode()])
  assert found.itemsize <= keys.MAX_BYTES
  assert found[0] == found[3] == found[4] != found[1]
  assert found[0].decode().startswith(key[:90]) and found[2] == b'short'
  assert keys.spell(found).tolist() == found.tolist()
  just = keys.spell(['y' * keys.MAX_BYTES])
  assert just.tolist() == [b'y' * keys.MAX_BYTES]


@pytest.mark.parametrize(
  'column', [pa.array([1.5]), pa.array([[1]]), pa.array([True])]
)
def test_other_types_are_refused(column):
  with pytest.raises(ValueError, match='text, bytes or integers'):
    keys.spell(column)


def test_numbered():
  assert keys.numbered('train', 2).tolist() == [
    b'train-000000000', b'train-000000001'
  ]  # fmt: skip
  assert keys.numbered('train', 0).tolist() == []


@pytest.mark.parametrize(
  ('shards', 'paths', 'expected'),
  [
    # Nothing is repeated, nothing changes.
    ([['b', 'a'], ['c']], ['x/0.tar', 'y/0.tar'], ['b', 'a', 'c']),
    ([['a', 'c'], ['b', 'd']], ['0.tar', '1.tar'], ['a', 'c', 'b', 'd']),
    # Two runs of img2dataset, of different length.
    (
      [['0', '1'], ['2'], ['1', '0']],
      ['/d/x/0.tar', '/d/x/1.tar', '/d/y/0.tar'],
      ['x/0/0', 'x/0/1', '2', 'y/0/1', 'y/0/0'],
    ),
    # Numbers that begin anew in every shard.
    ([['0'], [], ['0']], ['d/0.tar', 'd/1.tar', 'd/2.tar'], ['0/0', '2/0']),
    # Repeated within one shard only: left to whoever leaves out duplicates.
    ([['0', '0'], ['1']], ['0.tar', '1.tar'], ['0', '0', '1']),
    ([[], ['0']], ['m://b/x.parquet', 'm://b/y.parquet'], ['0']),
  ],
)
def test_keys_of_several_shards_are_told_apart(shards, paths, expected):
  found = keys.across([keys.spell(shard) for shard in shards], paths)
  assert found.astype(str).tolist() == expected
