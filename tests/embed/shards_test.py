"""Shards as one array."""

import numpy as np
import pytest

from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors


def write(folder, sizes, dim=4):
  rows = np.arange(sum(sizes) * dim).reshape(-1, dim) / 100
  start = 0
  for shard, size in enumerate(sizes):
    keys = [f'k{i}' for i in range(start, start + size)]
    shards.write_shard(
      folder,
      shard,
      rows=rows[start : start + size],
      keys=keys,
      captions=[''] * size,
      notes={'bad': {'empty': shard}},
    )
    start += size
  return rows.astype(np.float16)


def test_slices_cross_shards(tmp_path):
  rows = write(tmp_path, [3, 0, 5, 2])
  found = shards.Embeddings(tmp_path, 4)
  assert found.shape == (10, 4)
  for start in range(11):
    for stop in range(start, 12):
      np.testing.assert_array_equal(found[start:stop], rows[start:stop])
  assert found.keys().tolist() == [f'k{i}'.encode() for i in range(10)]
  assert shards.read_notes(tmp_path, 2)['bad'] == {'empty': 2}


def test_files_are_float16_in_the_usual_layout(tmp_path):
  write(tmp_path, [3])
  saved = np.load(tmp_path / 'img_emb/img_emb_00000.npy')
  assert saved.dtype == np.float16 and saved.shape == (3, 4)
  assert (tmp_path / 'metadata/metadata_00000.parquet').exists()


def test_broken_folders_are_refused_by_name(tmp_path):
  with pytest.raises(errors.UserError, match='img_emb_00000.npy'):
    shards.Embeddings(tmp_path, 1)
  write(tmp_path, [3, 3])
  path = shards.row_path(tmp_path, 1)
  np.save(path, np.zeros((3, 5), np.float16))
  with pytest.raises(errors.UserError, match='img_emb_00001.*5'):
    shards.Embeddings(tmp_path, 2)
  np.save(path, np.zeros((2, 4), np.float16))
  with pytest.raises(errors.UserError, match='metadata_00001.*3 rows'):
    shards.Embeddings(tmp_path, 2).keys()
  shards.metadata_path(tmp_path, 0).write_bytes(b'junk')
  with pytest.raises(errors.UserError, match='metadata_00000.parquet'):
    shards.read_notes(tmp_path, 0)
  path.write_bytes(b'junk')
  with pytest.raises(errors.UserError, match='img_emb_00001'):
    shards.Embeddings(tmp_path, 2)


def test_pickles_are_refused(tmp_path):
  write(tmp_path, [3])
  path = shards.row_path(tmp_path, 0)
  np.save(path, np.array([{'a': 1}], dtype=object), allow_pickle=True)
  with pytest.raises(errors.UserError, match='img_emb_00000'):
    shards.Embeddings(tmp_path, 1)
