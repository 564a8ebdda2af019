"""Label shards."""

import numpy as np

from mlcd_jax import manifests
from mlcd_jax.cluster import labels
from mlcd_jax.runtime import files


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
