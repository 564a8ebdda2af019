"""Unit rows of every finite size, in NumPy and in JAX."""

import numpy as np
import pytest

from mlcd_jax import unit

_BOTH = pytest.mark.parametrize(
  'unit_rows', [unit.unit_rows, lambda x: np.asarray(unit.unit_rows_jax(x))]
)


def expected(rows):
  rows = rows.astype(np.float64)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@_BOTH
@pytest.mark.parametrize('size', [1e-30, 1e-20, 1e-3, 1, 1e5, 1e20, 1e37])
def test_rows_of_any_finite_size(unit_rows, size):
  rows = np.random.default_rng(0).normal(size=(5, 12))
  rows = (size * rows / np.abs(rows).max()).astype(np.float32)
  found = unit_rows(rows)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected(rows), rtol=1e-5)


@_BOTH
def test_the_size_of_one_row_changes_no_other(unit_rows):
  rows = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
  before = unit_rows(rows)
  rows[2] *= 1e30
  found = unit_rows(rows)
  np.testing.assert_array_equal(found[[0, 1, 3]], before[[0, 1, 3]])
  np.testing.assert_allclose(found[2], before[2], rtol=1e-6)


@_BOTH
def test_zero_and_not_finite_rows_become_zero(unit_rows):
  rows = np.ones((4, 3), np.float32)
  rows[1], rows[2, 0], rows[3, 1] = 0, np.nan, np.inf
  found = unit_rows(rows)
  assert not found[1:].any()
  np.testing.assert_allclose(found[0], 3**-0.5, rtol=1e-6)
