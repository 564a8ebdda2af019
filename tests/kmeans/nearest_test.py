"""The nearest centers by low-precision candidates, against float64."""

import jax
import numpy as np
import pytest

from mlcd_jax import sharding
from mlcd_jax.kmeans import nearest


@pytest.fixture(name='look_up', params=['bfloat16', 'float32'])
def fixture_look_up(request):
  """As on a CPU with products of bfloat16, and on one without."""

  def look_up(x, centers, count, mesh=None, **options):
    mesh = mesh or sharding.make_mesh()
    program = nearest.make_lookup(
      mesh, len(centers), count, score_dtype=request.param, **options
    )
    chunks = nearest.look_up_all(program, x, centers, count, mesh=mesh)
    return nearest.joined(chunks, len(x), count)

  return look_up


def make(num_rows, num_centers, dim=64, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num_rows + num_centers, dim)) + 0.5
  x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
  return x[:num_rows], x[num_rows:]


def expected(x, centers, count):
  scores = x.astype(np.float64) @ centers.T.astype(np.float64)
  return np.argsort(-scores, axis=1, kind='stable')[:, :count]


@pytest.mark.parametrize('spare', [0, 8, 40])
def test_exact_however_many_are_in_doubt(look_up, spare):
  x, centers = make(600, 1_100)
  labels, scores = look_up(x, centers, 8, spare=spare)
  np.testing.assert_array_equal(labels, expected(x, centers, 8))
  np.testing.assert_allclose(
    scores,
    np.take_along_axis(x @ centers.T, labels, axis=1),
    atol=1e-6,
  )


def test_low_precision_alone_would_not_do():
  x, centers = make(600, 1_100)
  low = [np.asarray(a.astype(jax.numpy.bfloat16), np.float32)
         for a in (x, centers)]  # fmt: skip
  assert (expected(*low, 8) != expected(x, centers, 8)).any()


def test_ties_go_to_the_lower_index(look_up):
  x, centers = make(200, 1_500)
  centers[1_400:] = centers[100:200]
  labels, _ = look_up(x, centers, 4)
  np.testing.assert_array_equal(labels, expected(x, centers, 4))


@pytest.mark.parametrize('shape', [(8, 1), (2, 2), (1, 4)])
def test_equal_on_every_mesh(look_up, shape):
  x, centers = make(700, 1_300)
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  one = sharding.make_mesh(devices=jax.devices()[:1])
  for a, b in zip(
    look_up(x, centers, 8, mesh=mesh),
    look_up(x, centers, 8, mesh=one),
  ):
    np.testing.assert_array_equal(a, b)
