"""Two-level k-means: proportions, cells, and the way to the flat one."""

import jax
import numpy as np
import pytest

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax.kmeans import two_level


def make_rows(num_rows, dim=16, clusters=40, seed=0):
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(clusters, dim))
  x = centers[rng.integers(clusters, size=num_rows)]
  return (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32)


@pytest.fixture(name='mesh')
def fixture_mesh():
  return sharding.make_mesh(2, 1, devices=jax.devices()[:2])


@pytest.mark.parametrize('total', [1, 7, 50, 99, 100])
def test_counts_are_in_proportion_and_add_up(total):
  sizes = np.array([40, 0, 1, 33, 26])
  counts = two_level.in_proportion(sizes, total)
  assert counts.sum() == total
  assert np.all(counts <= sizes)
  assert np.abs(counts - sizes * total / 100).max() < 1


def test_plus_plus_takes_every_far_cluster():
  rng = np.random.default_rng(0)
  x = np.repeat(np.eye(12, dtype=np.float32), 50, axis=0)
  x += 1e-3 * rng.normal(size=x.shape).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  found = two_level.plus_plus(x, 12, seed=3)
  assert sorted(found.argmax(1)) == list(range(12))
  copies = np.ones((5, 4), np.float32) / 2
  np.testing.assert_array_equal(two_level.plus_plus(copies, 5, 0), copies)


def test_cells_are_clustered_by_themselves(mesh):
  x = make_rows(3_000)
  x[7], x[9] = 0, np.nan
  options = dict(sample=x[:600], iterations=8, seed=1, mesh=mesh)
  centers, report = two_level.fit(x, (8, 5), **options)
  assert centers.shape == (40, 16)
  np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
  before, after = report['cells_objective']
  assert before < after
  assert before >= report['coarse_objective'][-1] - 1e-4
  # Every row's own cell's best center is at most the best of all.
  _, cosines = kmeans.nearest_centers(x, centers, 1, mesh=mesh)
  best = cosines[cosines != 0].mean()
  assert after <= best + 1e-5
  flat = kmeans.fit(x, 40, iterations=8, init=centers, mesh=mesh)
  assert flat.objective[0] == pytest.approx(best, abs=1e-3)
  assert flat.objective[-1] > flat.objective[0]
  again, _ = two_level.fit(x, (8, 5), **options)
  np.testing.assert_array_equal(again, centers)


def test_cells_that_do_not_fit_at_once_give_the_same(mesh, monkeypatch):
  x = make_rows(1_500)
  options = dict(sample=x[:300], iterations=4, seed=0, mesh=mesh)
  expected, _ = two_level.fit(x, (6, 4), **options)
  monkeypatch.setattr(two_level, '_CHUNK', 100)
  monkeypatch.setattr(two_level.os, 'sysconf', lambda name: 200)
  found, _ = two_level.fit(x, (6, 4), **options)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('rows', ['constant', 'as many centers', 'copies'])
def test_degenerate_rows(mesh, rows):
  x = {
    'constant': np.ones((60, 8), np.float32),
    'as many centers': make_rows(24, 8),
    'copies': np.repeat(np.eye(8, dtype=np.float32), 6, axis=0),
  }[rows]
  centers, report = two_level.fit(
    x, (4, 6), sample=x, iterations=3, seed=0, mesh=mesh
  )
  np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
  if rows != 'copies':
    assert report['cells_objective'][1] == pytest.approx(1, abs=1e-5)


def test_too_few_rows_are_refused(mesh):
  x = make_rows(30)
  x[:10] = 0
  with pytest.raises(ValueError, match='24 centers need.*20 of 30'):
    two_level.fit(x, (4, 6), sample=x[10:], iterations=2, seed=0, mesh=mesh)
