"""Broken shards and images: what is left, what is counted, what stops."""

import types

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax.data import matching
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.embed import shards as shards_lib
from mlcd_jax.embed import stage as embed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import problems
from mlcd_jax.train import stage as train
from tests.data import shards


def _data(path, source='webdataset', **fields):
  config = config_lib.default()
  config.data.source = source
  config.data.path = str(path)
  config.data.cache_dir = f'{path}.cache'
  config.data.max_bad_fraction = 0.5
  config.data.update(fields)
  return config.data


def _open(path, **fields):
  """The source and what was left out of it."""
  found = problems.Problems('test')
  return sources.make(_data(path, **fields), found=found), found


def _members(count, first=0):
  return [(f'{i:04d}.jpg', shards.jpeg(i)) for i in range(first, first + count)]


def test_truncated_tar_keeps_what_is_whole(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(10))
  shards.tar(tmp_path / '1.tar', _members(10, first=10))
  content = (tmp_path / '0.tar').read_bytes()
  cut = content.index(b'0006.jpg') + 700  # Within the data of 0006.
  (tmp_path / '0.tar').write_bytes(content[:cut])
  source, found = _open(tmp_path)
  assert source.keys().tolist() == [
    *(f'{i:04d}'.encode() for i in range(6)),
    *(f'{i:04d}'.encode() for i in range(10, 20)),
  ]
  assert found.counts == {'truncated tar': 1}
  assert found.examples == [f'{tmp_path}/0.tar (truncated tar)']


def test_tar_without_end_counts_as_truncated(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(3))
  content = (tmp_path / '0.tar').read_bytes()
  end = content.index(b'0002.jpg')
  (tmp_path / '0.tar').write_bytes(content[:end])
  source, found = _open(tmp_path)
  assert len(source) == 2
  assert found.counts == {'truncated tar': 1}


def test_garbage_in_a_tar_ends_it(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(4))
  content = bytearray((tmp_path / '0.tar').read_bytes())
  header = content.index(b'0002.jpg')
  content[header + 124 : header + 136] = b'-7777777777\0'
  (tmp_path / '0.tar').write_bytes(content)
  source, found = _open(tmp_path)
  assert len(source) == 2
  assert found.counts == {'truncated tar': 1}


@pytest.mark.parametrize(
  ('source', 'suffix'),
  [
    ('webdataset', 'tar'),
    ('parquet', 'parquet'),
    ('array_record', 'array_record'),
  ],
)
def test_empty_and_unreadable_shards(tmp_path, source, suffix):
  write = {
    'webdataset': lambda path: shards.tar(path, _members(8)),
    'parquet': lambda path: shards.parquet(path, 8),
    'array_record': lambda path: shards.array_record(path, 8),
  }[source]
  write(tmp_path / f'0.{suffix}')
  (tmp_path / f'1.{suffix}').write_bytes(b'')
  (tmp_path / f'2.{suffix}').write_bytes(b'<html>404</html>' * 100)
  opened, found = _open(tmp_path, source=source)
  assert len(opened) == 8
  unreadable = 'truncated tar' if suffix == 'tar' else 'unreadable shard'
  assert found.counts == {'empty shard': 1, unreadable: 1}


def test_truncated_parquet_and_array_record(tmp_path):
  for source, suffix in (
    ('parquet', 'parquet'),
    ('array_record', 'array_record'),
  ):
    folder = tmp_path / source
    folder.mkdir()
    getattr(shards, source)(folder / f'0.{suffix}', 8)
    getattr(shards, source)(folder / f'1.{suffix}', 200)
    path = folder / f'1.{suffix}'
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    opened, found = _open(folder, source=source)
    assert len(opened) == 8
    assert found.counts == {'unreadable shard': 1}


def test_corrupt_array_record_has_no_image(tmp_path):
  path = tmp_path / '0.array_record'
  shards.array_record(path, 100)
  content = bytearray(path.read_bytes())
  content[5_000:5_400] = b'\xff' * 400
  path.write_bytes(content)
  source, found = _open(tmp_path, source='array_record')
  images = [source[i]['image'] for i in range(100)]
  assert 1 <= images.count(b'') <= 2
  assert not found.counts


def test_names_that_lead_elsewhere_are_left_out(tmp_path):
  shards.tar(
    tmp_path / '0.tar',
    [
      ('../../etc/evil.jpg', shards.jpeg(0)),
      ('../../etc/evil.txt', b'x'),
      ('/absolute.jpg', shards.jpeg(1)),
      ('./good/0001.jpg', shards.jpeg(2)),
      ('a..b/0002.jpg', shards.jpeg(3)),
    ],
  )
  source, found = _open(tmp_path)
  assert source.keys().tolist() == [b'good/0001', b'a..b/0002']
  assert found.counts == {'unsafe name': 2}
  assert found.examples[0] == '../../etc/evil.jpg (unsafe name)'


def test_of_a_key_repeated_in_a_shard_the_first_counts(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(3) + _members(1, first=1))
  shards.tar(tmp_path / '1.tar', [('0002.jpg', shards.jpeg(9))])
  source, found = _open(tmp_path)
  assert source.keys().tolist() == [b'0000', b'0001', b'0/0002', b'1/0002']
  assert source[2]['image'] == shards.jpeg(2)
  assert source[3]['image'] == shards.jpeg(9)
  assert found.counts == {'duplicate key': 1}


def test_members_without_an_image_and_long_names(tmp_path):
  long_name = 'x' * 150
  shards.tar(
    tmp_path / '0.tar',
    [
      ('0000.txt', b'no picture'),
      (f'{long_name}.jpg', shards.jpeg(0)),
      (f'{long_name}.txt', b'long'),
      ('._0001.jpg', b'resource fork'),
      ('readme', b'x'),
      ('0002.seg.png', shards.jpeg(1)),
      ('0003.JPG', shards.jpeg(3)),
    ],
  )
  source, found = _open(tmp_path)
  assert source.keys().tolist() == [long_name.encode(), b'0003']
  assert source[0]['caption'] == 'long'
  assert found.counts == {'no image': 1}


def test_invalid_utf8_caption_is_replaced(tmp_path):
  shards.tar(
    tmp_path / '0.tar', [('0.jpg', shards.jpeg(0)), ('0.txt', b'caf\xe9 \xff')]
  )
  source, found = _open(tmp_path)
  assert source[0]['caption'] == 'caf\ufffd \ufffd'
  assert not found.counts


def test_too_much_left_out_stops_with_examples(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(4) + _members(4))
  with pytest.raises(errors.UserError) as e:
    sources.make(_data(tmp_path, max_bad_fraction=0.4))
  assert str(e.value).startswith(
    'data.path: 4 of 8 images are bad (4 duplicate key), such as 0000 '
    '(duplicate key), 0001 (duplicate key), 0002 (duplicate key), more than '
    'data.max_bad_fraction=0.4 allows. Mend these files, or raise it'
  )


_BAD = {
  3: (b'', 'empty'),
  5: (b'<html>404</html>', 'not an image'),
  8: (shards.jpeg(8)[:-50], 'undecodable'),
}


def _with_bad_images(folder, count=40):
  """Tars of which `_BAD` are broken."""
  folder.mkdir()
  shards.tar(
    folder / '0.tar',
    [
      (f'{i:04d}.jpg', _BAD[i][0] if i in _BAD else shards.jpeg(i))
      for i in range(count)
    ],
  )


def _train_batches(source, steps, **options):
  label_rows = np.arange(len(source))
  rows = np.tile(label_rows[:, None], (1, 4)).astype(np.int32)
  batches = pipelines.train_batches(
    source,
    label_rows,
    rows,
    num_positives=2,
    batch_size=10,
    image_size=28,
    crop_area=(0.5, 1.0),
    flip=True,
    seed=0,
    **options,
  )
  return [next(batches) for _ in range(steps)]


def test_training_keeps_shapes_and_order(tmp_path, caplog):
  _with_bad_images(tmp_path / 'bad')
  source, _ = _open(tmp_path / 'bad')
  shards.tar(tmp_path / 'good.tar', _members(40))
  good, _ = _open(tmp_path / 'good.tar')
  seen = 0
  for a, b in zip(_train_batches(source, 8), _train_batches(good, 8)):
    assert set(a) == {'image', 'labels', 'weight'}
    assert b['weight'].all()
    is_bad = np.isin(b['labels'][:, 0], list(_BAD))
    np.testing.assert_array_equal(a['weight'], 1 - is_bad)
    assert (a['image'][is_bad] == 0).all()
    assert (a['labels'][is_bad] == -1).all()
    np.testing.assert_array_equal(a['image'][~is_bad], b['image'][~is_bad])
    np.testing.assert_array_equal(a['labels'][~is_bad], b['labels'][~is_bad])
    seen += is_bad.sum()
  assert seen == 2 * len(_BAD)  # 80 images: two epochs.


def test_training_logs_the_first_keys_then_counts(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(
    problems._log, 'warning', lambda text, *args: lines.append(text % args)
  )
  _with_bad_images(tmp_path / 'bad')
  source, _ = _open(tmp_path / 'bad')
  _train_batches(source, 4 * 12)  # 36 bad images.
  assert len(lines) == 21
  assert {line for line in lines[:20]} == {
    f'train: {i:04d}: {reason}' for i, (_, reason) in _BAD.items()
  }
  assert lines[20] == 'train: from here on they are only counted'


def test_training_stops_when_too_much_is_bad(tmp_path):
  _with_bad_images(tmp_path / 'bad')
  source, _ = _open(tmp_path / 'bad')
  with pytest.raises(
    errors.UserError, match='75 of 1000 .*max_bad_fraction=0.07'
  ):
    _train_batches(source, 120, max_bad_fraction=0.07)


def test_embedding_has_no_row_for_a_bad_image(tmp_path):
  _with_bad_images(tmp_path / 'bad')
  config = config_lib.default()
  config.data = _data(tmp_path / 'bad')
  config.embed.shard_rows = 16
  fields = ('embedder', 'image_size', 'batch_size')
  manifest = manifests.Manifest(
    'embed',
    tmp_path / 'embeddings',
    config={f'embed.{name}': config.embed[name] for name in fields},
    inputs={},
  )
  embed.run(config, manifest)
  good = [f'{i:04d}' for i in range(40) if i not in _BAD]
  made = shards_lib.open_made(manifests.load(tmp_path / 'embeddings'))
  assert made.keys().astype(str).tolist() == good
  assert manifest.result['bad'] == {r: 1 for _, r in _BAD.values()}
  assert sum(manifest.result['shard_rows']) == 37

  config.data.max_bad_fraction = 0.05
  with pytest.raises(errors.UserError) as e:
    embed.run(config, manifest)
  assert '3 of 40 images are bad (1 empty, 1 not an image, ' in str(e.value)
  assert '0003 (empty), 0005 (not an image)' in str(e.value)


def test_join_is_by_key(tmp_path):
  source_keys = np.array([b'b', b'a', b'x', b'c'])
  label_keys = np.array(['c', 'zz', 'a', 'b'])
  rows = matching.join(source_keys, label_keys)
  np.testing.assert_array_equal(rows, [3, 2, -1, 0])
  np.testing.assert_array_equal(
    matching.join(source_keys, label_keys[:0]), [-1] * 4
  )
  umlaut = np.array(['\u00e4', 'a'])
  np.testing.assert_array_equal(
    matching.join(np.strings.encode(umlaut, 'utf-8'), umlaut[::-1]), [1, 0]
  )


def test_rows_missing_on_either_side_are_counted(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(
    train._log, 'warning', lambda text, *args: lines.append(text % args)
  )
  shards.tar(tmp_path / '0.tar', _members(10))
  config = config_lib.default()
  config.data = _data(tmp_path)
  source = sources.make(config.data)
  keys = [f'{i:04d}' for i in (*range(12, 9, -1), *range(7, -1, -1), 7)]
  made = types.SimpleNamespace(keys=lambda: np.array(keys, 'S'))
  monkeypatch.setattr(train.shards, 'open_made', lambda manifest: made)
  rows = train._label_rows(config, source, None)
  np.testing.assert_array_equal(rows, [10, 9, 8, 7, 6, 5, 4, 3, -1, -1])
  assert lines == [
    'train: 2 of 10 images have no labels and weigh nothing; 4 of 12 label '
    'rows have no image, 1 of them since an earlier row has the same key'
  ]
  config.data.max_bad_fraction = 0.1
  with pytest.raises(
    errors.UserError, match='such as 0008, 0009.*such as 0012, 0011, 0010'
  ):
    train._label_rows(config, source, None)


def test_bad_keys_are_left_out(tmp_path):
  shards.tar(tmp_path / '0.tar', _members(6))
  (tmp_path / 'bad_keys.txt').write_text('0001\n0004\nunknown\n')
  source, found = _open(tmp_path, bad_keys=str(tmp_path / 'bad_keys.txt'))
  assert source.keys().tolist() == [b'0000', b'0002', b'0003', b'0005']
  assert source[1]['image'] == shards.jpeg(2)
  assert not found.counts
  with pytest.raises(errors.UserError, match='data.bad_keys=nothing'):
    _open(tmp_path, bad_keys='nothing')


def test_other_bad_keys_in_a_begun_stage(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  one.write_text('a\n')
  two.write_text('b\n')
  manifest = manifests.Manifest('train', tmp_path, config={}, inputs={})
  manifests.check_bad_keys(str(one), manifest)
  manifests.check_bad_keys(str(one), manifests.load(tmp_path))
  with pytest.raises(errors.UserError, match='begun with other keys'):
    manifests.check_bad_keys(str(two), manifests.load(tmp_path))
