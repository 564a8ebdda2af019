"""k-means against numpy, on every mesh, and on data that is hard on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import kmeans
from mlcd_jax import sharding
from tests.kmeans import fits

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_rows(num_rows, dim=16, seed=0):
  rng = np.random.default_rng(seed)
  return unit(rng.normal(size=(num_rows, dim))).astype(np.float32)


def lloyd(x, centers, iterations):
  """Spherical k-means in float64; no cluster may become empty."""
  x, centers = x.astype(np.float64), centers.astype(np.float64)
  objective = []
  for _ in range(iterations):
    scores = x @ centers.T
    labels = scores.argmax(1)
    objective.append(scores.max(1).mean())
    sums = np.zeros_like(centers)
    np.add.at(sums, labels, x)
    assert np.bincount(labels, minlength=len(centers)).min() > 0
    centers = unit(sums)
  return centers, objective


@pytest.mark.parametrize('mesh_shape', MESHES)
def test_equals_numpy(mesh_shape):
  x = make_rows(1_100)
  init = np.arange(0, 1_100, 37)  # 30 rows, not a multiple of any tile.
  fit = fits.states(
    x * 3,  # Rows are normalised inside.
    len(init),
    iterations=6,
    init=init,
    assigner=fits.plain(jnp.float32),
    mesh=sharding.make_mesh(*mesh_shape),
  )[-1]
  centers, objective = lloyd(x, x[init], 6)
  np.testing.assert_allclose(fit.objective, objective, rtol=1e-5)
  np.testing.assert_allclose(fit.centers, centers, atol=1e-4)
  assert fit.counts.sum() == len(x)
  assert fit.reseeded == [0] * 6


def test_bfloat16_scores_keep_the_objective():
  x = make_rows(2_000, seed=1)
  fine, coarse = (
    fits.states(x, 40, iterations=8, assigner=fits.plain(dtype))[-1]
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert abs(fine.objective[-1] - coarse.objective[-1]) < 2e-3


def test_one_pass_is_equal_on_every_mesh():
  x = make_rows(1_500, seed=2)
  centers = make_rows(700, seed=3)
  expected = None
  for devices in (1, 2, 4, 8):
    for fsdp in (1, 2, 4, 8):
      if devices % fsdp:
        continue
      mesh = sharding.make_mesh(
        devices // fsdp, fsdp, devices=jax.devices()[:devices]
      )
      labels, scores = kmeans.nearest_centers(x, centers, 10, mesh=mesh)
      fit = kmeans.fit(x, 700, iterations=1, init=centers, mesh=mesh)
      found = (labels, scores, fit.counts)
      expected = expected or found
      for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


def test_nearest_centers_are_exact_and_ties_go_to_the_lower_index():
  x = make_rows(300)
  centers = make_rows(600, seed=1)
  centers[590] = centers[5]  # In another tile, on another device.
  labels, scores = kmeans.nearest_centers(
    x, centers, 8, mesh=sharding.make_mesh(2, 4)
  )
  dense = x.astype(np.float64) @ centers.T.astype(np.float64)
  expected = np.argsort(-np.round(dense, 6), axis=1, kind='stable')[:, :8]
  np.testing.assert_array_equal(labels, expected)
  np.testing.assert_allclose(
    scores, np.take_along_axis(dense, expected, 1), atol=1e-6
  )


def test_same_seed_same_bits():
  x = make_rows(900)
  a, b, c = (
    kmeans.fit(x, 50, iterations=5, seed=seed).centers for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(a, b)
  assert not np.array_equal(a, c)


@pytest.mark.parametrize('method', ['auto', 'exact'])
def test_goes_on_with_the_same_bits(method):
  x = make_rows(900)
  x[5] = 0
  options = dict(iterations=6, method=method)
  saved = list(kmeans.iterate(x, 50, init=np.repeat(7, 50), **options))
  whole = saved[-1]
  assert len(saved) == 6 and max(whole.reseeded) > 0
  assert (whole.skipped, whole.bad_rows) == (1, [5])
  assert (whole.assigner, dict(whole.assigner_state)) == ('plain', {})
  fits.assert_same(kmeans.fit(x, 50, init=np.repeat(7, 50), **options), whole)
  fits.assert_same(kmeans.fit(x, 50, init=saved[2], **options), whole)
  rest = kmeans.iterate(x, 50, init=saved[2], **options)
  assert [len(state.objective) for state in rest] == [4, 5, 6]
  assert not list(kmeans.iterate(x, 50, init=whole, **options))
  fits.assert_same(kmeans.fit(x, 50, init=whole, **options), whole)


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_read_anew_or_held_gives_the_same_bits(dtype):
  x = make_rows(5_000).astype(dtype)
  x[4_999] = np.nan
  mesh = sharding.make_mesh(2, 1, devices=jax.devices()[:2])
  reads = []

  class Counted:
    shape = x.shape

    def __getitem__(self, rows):
      reads.append(rows)
      return x[rows]

  options = dict(iterations=4, mesh=mesh, chunk=512)
  held = fits.states(Counted(), 60, hold=True, **options)[-1]
  reads_held = len(reads)
  streamed = fits.states(Counted(), 60, hold=False, **options)[-1]
  in_chunks = [rows for rows in reads if rows.stop - rows.start > 1]
  chunks_held = sum(r.stop - r.start > 1 for r in reads[:reads_held])
  assert len(in_chunks) - chunks_held > 3 * chunks_held // 2
  assert held.bad_rows == streamed.bad_rows == [4_999]
  fits.assert_same(held, streamed)
  labels, _ = kmeans.nearest_centers(Counted(), held.centers, 3, mesh=mesh)
  expected, _ = kmeans.nearest_centers(x[:700], held.centers, 3, mesh=mesh)
  np.testing.assert_array_equal(labels[:700], expected)


def test_empty_clusters_restart_at_the_worst_served_rows():
  x = make_rows(500)
  # Centers 1.. coincide with 0, so nothing is nearest to them but ties.
  init = np.repeat(x[:1], 20, axis=0)
  fit = kmeans.fit(x, 20, iterations=10, init=init)
  assert fit.reseeded[0] == 19
  assert fit.reseeded[-1] == 0
  assert fit.counts.min() > 0
  assert fit.objective[-1] > fit.objective[0]


def test_as_many_centers_as_rows():
  x = make_rows(40)
  fit = kmeans.fit(x, 40, iterations=3)
  assert fit.objective[-1] == pytest.approx(1.0, abs=1e-5)
  np.testing.assert_array_equal(fit.counts, np.ones(40))


def test_constant_rows():
  x = np.ones((64, 8), np.float32)
  fit = kmeans.fit(x, 4, iterations=3)
  assert fit.objective[-1] == pytest.approx(1.0, abs=1e-5)
  assert np.isfinite(fit.centers).all()


def test_unusable_rows_are_left_out():
  x = make_rows(200)
  bad = x.copy()
  bad[3], bad[5], bad[7] = 0, np.nan, np.inf
  init = np.arange(10, 30)
  found = kmeans.fit(bad, 20, iterations=4, init=init)
  expected = kmeans.fit(np.delete(x, [3, 5, 7], 0), 20, iterations=4,
                        init=init - 3)  # fmt: skip
  assert found.skipped == 3
  assert found.counts.sum() == 197
  np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-5)


def test_tolerance_stops_early():
  fit = kmeans.fit(make_rows(400), 10, iterations=50, tolerance=1e-3)
  assert len(fit.objective) < 50
  fit = kmeans.fit(make_rows(400), 10, iterations=50)
  assert len(fit.objective) == 50


def test_data_with_a_large_mean_keeps_its_precision():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2_000, 32)) * np.linspace(0.04, 0.4, 32) + 3
  coarse, fine = (
    fits.states(x, 30, iterations=30, assigner=fits.plain(dtype))[-1].objective
    for dtype in (jnp.bfloat16, jnp.float32)
  )
  assert np.diff(coarse).min() > -1e-6
  assert coarse[-1] == pytest.approx(fine[-1], abs=1e-4)


def test_wrong_uses_are_refused():
  x = make_rows(20)
  with pytest.raises(ValueError, match='21 centers'):
    kmeans.fit(x, 21)
  with pytest.raises(ValueError, match='init has shape'):
    kmeans.fit(x, 4, init=np.zeros((3, 16)))
  with pytest.raises(ValueError, match='auto or exact'):
    kmeans.fit(x, 4, method='on')
  with pytest.raises(ValueError, match='init has centers of shape'):
    kmeans.fit(x, 4, init=kmeans.fit(x, 5, iterations=1))
  with pytest.raises(ValueError, match='5 labels from 4'):
    kmeans.nearest_centers(x, x[:4], 5)
  with pytest.raises(ValueError, match='dimensions'):
    kmeans.nearest_centers(x, x[:4, :8], 2)
