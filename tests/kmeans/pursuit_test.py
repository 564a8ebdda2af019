"""Matching pursuit of rows on centers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import tiles

# With tiles of 1,024 or more centers each of 8 devices holds real centers, and
# the last one padding beside them.
CENTERS, DIM = 7_300, 24


def make_rows(count, dim=DIM, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(count, dim)) + 0.1).astype(np.float32)


def make_mesh(*shape):
  return sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


def expected(x, centers, count, min_gain=1e-3):
  """Returns labels and scores, and which labels no rounding can change."""
  c = unit.unit_rows(centers).astype(np.float64)
  labels = np.full((len(x), count), -1)
  scores, sure = np.zeros(labels.shape), np.ones(labels.shape, bool)
  for n, r in enumerate(unit.unit_rows(x).astype(np.float64)):
    for i in range(count):
      products = c @ r
      products[labels[n, :i]] = -np.inf
      best = int(np.argmax(products))
      sure[n, i:] &= abs(products[best] - min_gain) > 1e-6
      if products[best] <= min_gain:
        break
      sure[n, i:] &= products[best] - np.delete(products, best).max() > 1e-6
      labels[n, i], scores[n, i] = best, products[best]
      r = r - products[best] * c[best]
  return labels, scores, sure


def assert_expected(found, x, centers, count, **options):
  labels, scores, sure = expected(x, centers, count, **options)
  assert sure.mean() > 0.98
  assert (found[0].dtype, found[1].dtype) == (np.int32, np.float32)
  np.testing.assert_array_equal(found[0][sure], labels[sure])
  np.testing.assert_allclose(found[1][sure], scores[sure], atol=2e-6)
  np.testing.assert_array_equal(found[1][found[0] < 0], 0)


@pytest.fixture(name='on_one', scope='module')
def fixture_on_one():
  """Rows, centers, and what one device finds."""
  x, centers = make_rows(300), make_rows(CENTERS, seed=1)
  return x, centers, kmeans.pursue(x, centers, 6, mesh=make_mesh(1, 1))


def test_exact(on_one):
  x, centers, found = on_one
  assert_expected(found, x, centers, 6)
  nearest, cosines = kmeans.nearest_centers(x, centers, 6)
  np.testing.assert_array_equal(found[0][:, 0], nearest[:, 0])
  np.testing.assert_allclose(found[1][:, 0], cosines[:, 0], atol=1e-6)
  assert (found[0] != nearest).any()


@pytest.mark.parametrize('shape', [(8, 1), (1, 8), (2, 4), (1, 3)])
def test_equal_on_every_mesh(on_one, shape):
  x, centers, (labels, scores) = on_one
  found = kmeans.pursue(x, centers, 6, mesh=make_mesh(*shape))
  sure = expected(x, centers, 6)[2]
  np.testing.assert_array_equal(found[0][sure], labels[sure])
  np.testing.assert_allclose(found[1][sure], scores[sure], atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.float32])
def test_read_by_slices_in_ragged_chunks(dtype):
  x, centers = make_rows(8_500).astype(dtype), make_rows(40, seed=1)
  x[8_499] = np.nan
  reads = []

  class Counted:
    shape = x.shape

    def __getitem__(self, rows):
      reads.append((rows.start, rows.stop))
      return x[rows]

  mesh = make_mesh(2, 1)
  streamed = kmeans.pursue(Counted(), centers, 4, mesh=mesh)
  in_memory = kmeans.pursue(x, centers, 4, mesh=mesh)
  np.testing.assert_array_equal(streamed, in_memory)
  # Each row is read once, and the last chunk is not full.
  assert len(reads) == 4 and max(b - a for a, b in reads) < 4_096
  assert sum(b - a for a, b in reads) == 8_500
  part = [a[8_200:] for a in streamed]
  assert_expected(part, x[8_200:].astype(np.float32), centers, 4)


def orthogonal(count, dim=64, seed=0):
  basis, _ = np.linalg.qr(make_rows(dim, dim, seed))
  return basis[:count].astype(np.float32)


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.float32])
def test_names_the_parts_of_a_sum_and_stops(dtype):
  centers = orthogonal(20)
  x = np.stack([
    centers[3],
    2 * centers[7] + centers[2],
    0.1 * centers[19] + 0.3 * centers[0] + 0.2 * centers[5],
    -centers[4],
    centers[9] - centers[4],
  ])  # fmt: skip
  labels, scores = kmeans.pursue(
    x.astype(dtype), 5 * centers, 4, mesh=make_mesh(2, 4)
  )
  np.testing.assert_array_equal(labels, [
    [3, -1, -1, -1],
    [7, 2, -1, -1],
    [0, 5, 19, -1],
    [-1, -1, -1, -1],
    [9, -1, -1, -1],
  ])  # fmt: skip
  np.testing.assert_allclose(scores, [
    [1, 0, 0, 0],
    [0.8**0.5 , 0.2**0.5, 0, 0],
    [0.3 / 0.14**0.5, 0.2 / 0.14**0.5, 0.1 / 0.14**0.5, 0],
    [0, 0, 0, 0],
    [0.5**0.5, 0, 0, 0],
  ], atol=3e-3 if dtype == jnp.bfloat16 else 5e-4)  # fmt: skip


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_a_center_is_named_once(shape):
  mesh = make_mesh(*shape)
  t = tiles.tile_shape(mesh, CENTERS)[1]
  # In other tiles, on other devices. The last is where the first would be if
  # its number were taken from the end of the tile before.
  places = [2 * t + 5, 7, 3 * t + 5]
  centers = np.zeros((4 * t, 3), np.float32)
  # After the second is subtracted, the product with the first is 0.288 again.
  centers[places] = [[1, 0, 0], [-0.8, 0.6, 0], [0, 0, 1]]
  x = np.array([[0.8, 0.6, 0.1]], np.float32)
  labels, scores = kmeans.pursue(x, centers, 4, mesh=mesh)
  np.testing.assert_array_equal(labels, [[*places, -1]])
  np.testing.assert_allclose(
    scores * np.linalg.norm(x), [[0.8, 0.36, 0.1, 0]], atol=1e-6
  )


def test_a_center_that_points_away_is_not_named():
  centers = abs(make_rows(256))  # No padding, whose products are 0.
  labels, scores = kmeans.pursue(-centers[:50], centers, 3)
  np.testing.assert_array_equal(labels, -1)
  np.testing.assert_array_equal(scores, 0)


def test_min_gain():
  x, centers = make_rows(200), make_rows(50, seed=1)
  found = kmeans.pursue(x, centers, 8, min_gain=0.25)
  assert_expected(found, x, centers, 8, min_gain=0.25)
  count = (found[0] >= 0).sum(1)
  assert 0 < count.min() < count.max() < 8
  assert found[1][found[0] >= 0].min() > 0.25


def test_as_many_labels_as_centers():
  # Few dimensions: named centers have the largest product again and again.
  x, centers = make_rows(300, 8), make_rows(30, 8, seed=1)
  labels, scores = kmeans.pursue(x, centers, 30, min_gain=0.01)
  assert_expected((labels, scores), x, centers, 30, min_gain=0.01)
  assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in labels)


def test_ties_go_to_the_lower_index_and_copies_are_not_named():
  x, centers = make_rows(100), make_rows(CENTERS, seed=1)
  centers[4_000:] = centers[: CENTERS - 4_000]
  labels, _ = kmeans.pursue(x, centers, 4, mesh=make_mesh(2, 4))
  assert_expected(
    kmeans.pursue(x, centers[:4_000], 4, mesh=make_mesh(2, 4)),
    x, centers[:4_000], 4,
  )  # fmt: skip
  assert labels.max() < 4_000


def test_unusable_rows_and_centers_are_not_named():
  x, centers = make_rows(60), make_rows(20, seed=1)
  x[3], x[5, 2], x[7, 0] = 0, np.nan, np.inf
  centers[0] = 0
  labels, scores = kmeans.pursue(x, centers, 3, min_gain=0)
  np.testing.assert_array_equal(labels[[3, 5, 7]], -1)
  np.testing.assert_array_equal(scores[[3, 5, 7]], 0)
  usable = np.delete(np.arange(60), [3, 5, 7])
  found = labels[usable], scores[usable]
  assert_expected(found, x[usable], centers, 3, min_gain=0)
  assert (labels != 0).all()


def test_wrong_uses_are_refused():
  x = make_rows(20)
  with pytest.raises(ValueError, match='5 labels from 4'):
    kmeans.pursue(x, x[:4], 5)
  with pytest.raises(ValueError, match='dimensions'):
    kmeans.pursue(x, x[:4, :8], 2)
  for value in (-0.1, float('nan')):
    with pytest.raises(ValueError, match='min_gain'):
      kmeans.pursue(x, x[:4], 2, min_gain=value)
