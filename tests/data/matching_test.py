"""Embeddings and images: joins by key, and by the end of a path."""

import numpy as np
import pytest

from mlcd_jax.data import keys
from mlcd_jax.data import matching

NAMES = [f'{i:04d}' for i in range(20)]
JPEGS = [f'{name}.jpg' for name in NAMES]


def test_join_ignores_order_and_marks_what_is_missing():
  label_keys = np.array(['c', 'a', 'z', 'b'])
  source_keys = np.array(['a', 'b', 'c', 'd', 'zz'])
  np.testing.assert_array_equal(
    matching.join(source_keys, label_keys), [1, 3, 0, -1, -1]
  )


def test_join_of_many():
  rng = np.random.default_rng(0)
  names = np.array([f'{i:06d}' for i in range(5_000)])
  label_keys = rng.permutation(names)[:4_000]
  rows = matching.join(names, label_keys)
  assert (rows >= 0).sum() == 4_000
  np.testing.assert_array_equal(label_keys[rows[rows >= 0]], names[rows >= 0])


def joined(source_keys, row_keys, root='/data/photos'):
  return matching.join(
    keys.spell(source_keys), keys.spell(row_keys), root
  ).tolist()


@pytest.mark.parametrize(
  ('source_keys', 'row_keys'),
  [
    (JPEGS, [f'/data/photos/{n}' for n in JPEGS]),
    (JPEGS, [f'file:///data/photos/{n}' for n in JPEGS]),
    (JPEGS, [f'/elsewhere/{n}' for n in JPEGS]),
    (JPEGS, [f'C:\\photos\\{n}' for n in JPEGS]),
    (JPEGS, [f's3://bucket/photos/{n}' for n in JPEGS]),
    (JPEGS, NAMES),
    (NAMES, [f'/out/00000/{n}' for n in JPEGS]),
    ([f'a/{n}' for n in JPEGS], [f'/data/photos/a/{n}' for n in JPEGS]),
    ([f'train/{n}' for n in JPEGS], JPEGS),
    ([f'été/{n}' for n in JPEGS], [f'/e/e\u0301te\u0301/{n}' for n in JPEGS]),
    ([f'a b/{n}' for n in JPEGS], [f'file:///x/a%20b/{n}' for n in JPEGS]),
    # Some by key, others by path, and these below several folders.
    (JPEGS, [*JPEGS[:9], *(f'/x/y/{n}' for n in JPEGS[9:])]),
    (
      [f'a/{n}' for n in NAMES] + [f'b/{n}' for n in NAMES],
      [f'/x/a/{n}' for n in JPEGS] + [f'/y/z/b/{n}' for n in JPEGS],
    ),
  ],
)
def test_paths_are_compared_from_their_end(source_keys, row_keys):
  assert joined(source_keys, row_keys) == list(range(len(row_keys)))
  backwards = list(range(len(row_keys)))[::-1]
  assert joined(source_keys, row_keys[::-1]) == backwards


@pytest.mark.parametrize(
  ('source_keys', 'row_keys'),
  [
    # One row for two images, or two rows for one.
    ([f'{c}/{n}' for c in 'ab' for n in JPEGS], JPEGS),
    (JPEGS, [f'/{c}/{n}' for c in 'ab' for n in JPEGS]),
    ([f'{n}.{s}' for s in ('png', 'jpg') for n in NAMES], NAMES),
    # Other images, a few of the same name.
    (JPEGS, [f'/x/{n}' for n in JPEGS[:3] + [f'z{n}' for n in JPEGS]]),
    (JPEGS, [f'z{n}' for n in JPEGS]),
    (['', *JPEGS], ['', '']),
  ],
)
def test_what_is_not_clear_matches_nothing(source_keys, row_keys):
  assert set(joined(source_keys, row_keys)) == {-1}


def test_the_folder_tells_equal_names_apart():
  rows = [f'/old/{folder}/{n}' for folder in ('other', 'photos') for n in JPEGS]
  assert joined(JPEGS, rows) == list(range(20, 40))


def test_a_few_missing_keys_are_no_paths():
  rows = [*NAMES[1:], '/x/0000']
  many = [f'{i:06d}' for i in range(1_000)]
  assert joined([*many, *NAMES], [*many, *rows])[1_000] == -1


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('/a/b', '/a/b'),
    ('/a/b/*.tar', '/a/b'),
    ('/a/b/{00000..00009}.tar', '/a/b'),
    ('/a/b/0.tar', '/a/b'),
    ('/a/{split}/x', '/a'),
    ('s3://bucket/a', 'bucket/a'),
  ],
)
def test_root_of(path, expected):
  assert matching.root_of(path) == expected
