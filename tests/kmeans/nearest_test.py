"""The nearest centers by low-precision candidates, against float64."""

import jax
import numpy as np
import pytest

from mlcd_jax import kmeans
from mlcd_jax import lookup
from mlcd_jax import nearest
from mlcd_jax import sharding


@pytest.fixture(autouse=True, params=['bfloat16', 'float32'])
def score_dtype(request, monkeypatch):
  """As on a CPU with products of bfloat16, and on one without."""
  dtype = jax.numpy.dtype(request.param)
  monkeypatch.setattr(nearest, 'score_dtype', lambda mesh: dtype)


def make(num_rows, num_centers, dim=64, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num_rows + num_centers, dim)) + 0.5
  x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
  return x[:num_rows], x[num_rows:]


def expected(x, centers, count):
  scores = x.astype(np.float64) @ centers.T.astype(np.float64)
  return np.argsort(-scores, axis=1, kind='stable')[:, :count]


@pytest.mark.parametrize('spare', [0, 8, 40])
def test_exact_however_many_are_in_doubt(monkeypatch, spare):
  monkeypatch.setattr(lookup, '_SPARE', spare)
  lookup._make_rescored.cache_clear()
  lookup._make_bucketed.cache_clear()
  x, centers = make(600, 1_100)
  labels, scores = kmeans.nearest_centers(x, centers, 8)
  np.testing.assert_array_equal(labels, expected(x, centers, 8))
  np.testing.assert_allclose(
    scores,
    np.take_along_axis(x @ centers.T, labels, axis=1),
    atol=1e-6,
  )
  lookup._make_rescored.cache_clear()
  lookup._make_bucketed.cache_clear()


def test_low_precision_alone_would_not_do():
  x, centers = make(600, 1_100)
  low = [np.asarray(a.astype(jax.numpy.bfloat16), np.float32)
         for a in (x, centers)]  # fmt: skip
  assert (expected(*low, 8) != expected(x, centers, 8)).any()


def test_ties_go_to_the_lower_index():
  x, centers = make(200, 1_500)
  centers[1_400:] = centers[100:200]
  labels, _ = kmeans.nearest_centers(x, centers, 4)
  np.testing.assert_array_equal(labels, expected(x, centers, 4))


@pytest.mark.parametrize('shape', [(8, 1), (2, 2), (1, 4)])
def test_equal_on_every_mesh(shape):
  x, centers = make(700, 1_300)
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  one = sharding.make_mesh(devices=jax.devices()[:1])
  for a, b in zip(
    kmeans.nearest_centers(x, centers, 8, mesh=mesh),
    kmeans.nearest_centers(x, centers, 8, mesh=one),
  ):
    np.testing.assert_array_equal(a, b)
