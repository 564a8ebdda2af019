"""Embeddings and images: joins by key, and by the end of a path."""

import numpy as np

from mlcd_jax.data import matching


def test_join_ignores_order_and_marks_what_is_missing():
  label_keys = np.array(['c', 'a', 'z', 'b'])
  source_keys = np.array(['a', 'b', 'c', 'd', 'zz'])
  np.testing.assert_array_equal(
    matching.join(source_keys, label_keys), [1, 3, 0, -1, -1]
  )


def test_join_of_many():
  rng = np.random.default_rng(0)
  keys = np.array([f'{i:06d}' for i in range(5_000)])
  label_keys = rng.permutation(keys)[:4_000]
  rows = matching.join(keys, label_keys)
  assert (rows >= 0).sum() == 4_000
  np.testing.assert_array_equal(label_keys[rows[rows >= 0]], keys[rows >= 0])
