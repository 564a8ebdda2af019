"""Label shards, and joins by key."""

import numpy as np

from mlcd_jax import files
from mlcd_jax import labels
from mlcd_jax import manifests


def test_labels_of_lower_cosine_are_left_out(tmp_path):
  rows = np.arange(12, dtype=np.int32).reshape(4, 3)
  scores = np.float32([[0.9, 0.5, 0.1], [0.4, 0.3, 0.2]] * 2)
  for shard, part in enumerate((slice(0, 2), slice(2, 4))):
    files.write_npy(tmp_path / f'labels_{shard:05d}.npy', rows[part])
    files.write_npy(tmp_path / f'scores_{shard:05d}.npy', scores[part])
  manifest = manifests.Manifest('cluster', tmp_path, config={}, inputs={})
  manifest.result = {'num_centers': 12, 'num_rows': 4, 'sha256': {}}
  found = labels.Labels(manifest, min_similarity=0.5)
  assert [found[i].tolist() for i in range(4)] == [
    [0, 1, -1],
    [-1, -1, -1],
    [6, 7, -1],
    [-1, -1, -1],
  ]


def test_join_ignores_order_and_marks_what_is_missing():
  label_keys = np.array(['c', 'a', 'z', 'b'])
  source_keys = np.array(['a', 'b', 'c', 'd', 'zz'])
  np.testing.assert_array_equal(
    labels.join(source_keys, label_keys), [1, 3, 0, -1, -1]
  )


def test_join_of_many():
  rng = np.random.default_rng(0)
  keys = np.array([f'{i:06d}' for i in range(5_000)])
  label_keys = rng.permutation(keys)[:4_000]
  rows = labels.join(keys, label_keys)
  assert (rows >= 0).sum() == 4_000
  np.testing.assert_array_equal(label_keys[rows[rows >= 0]], keys[rows >= 0])
