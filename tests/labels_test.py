"""Joins by key."""

import numpy as np

from mlcd_jax import labels


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
