"""Which centers become labels, against a dense reference in NumPy."""

import jax
import numpy as np
import pytest

from mlcd_jax import sharding
from mlcd_jax.cluster import rules
from mlcd_jax.config import choices

DIM, NUM_VIEWS = 16, 5


def make(num_images=37, num_centers=24, seed=0):
  """Random views and centers; some views are zero or not finite."""
  rng = np.random.default_rng(seed)
  views = rng.normal(size=(num_images, NUM_VIEWS, DIM)).astype(np.float32)
  views[:, 3] = views[:, 1]  # A repeat with the same cosine,
  views[:, 4] = views[:, 1] + 0.5 * views[:, 2]  # and at times another one.
  views[3, 0], views[4, 1], views[5, 2] = 0, np.nan, np.inf
  views[6], views[7, 1:] = 0, np.nan
  centers = rng.normal(size=(num_centers, DIM)).astype(np.float32)
  return views, centers / np.linalg.norm(centers, axis=1, keepdims=True)


def reference(views, centers, num_labels):
  """The rule `views`, image by image."""
  labels = np.full((len(views), num_labels), -1)
  scores = np.zeros(labels.shape)
  for i, rows in enumerate(views.astype(np.float64)):
    best = {}
    for row in rows:
      norm = np.linalg.norm(row)
      if not np.isfinite(norm) or norm == 0:
        continue
      cosines = centers.astype(np.float64) @ (row / norm)
      center = int(cosines.argmax())
      best[center] = max(best.get(center, -1), cosines[center])
    order = sorted(best, key=lambda center: (-best[center], center))
    for place, center in enumerate(order[:num_labels]):
      labels[i, place], scores[i, place] = center, best[center]
  return labels, scores


def joined(rule, images, centers, num_labels, mesh):
  pieces = rules.RULES[rule](images, centers, num_labels, mesh=mesh)
  return next(rules.recut(pieces, [len(images.rows)], num_labels))


def run(views, centers, num_labels, shape=(8, 1)):
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  images = rules.Images(views[:, 0], views.reshape(-1, DIM), NUM_VIEWS)
  return joined('views', images, centers, num_labels, mesh)


@pytest.mark.parametrize('shape', [(8, 1), (2, 4), (1, 1)])
@pytest.mark.parametrize('num_labels', [2, 8])
def test_views_on_every_mesh(shape, num_labels):
  views, centers = make()
  labels, scores = run(views, centers, num_labels, shape)
  expected = reference(views, centers, num_labels)
  np.testing.assert_array_equal(labels, expected[0])
  np.testing.assert_allclose(scores, expected[1], atol=1e-6)
  assert labels.dtype == np.int32 and scores.dtype == np.float32
  # Nothing of a zero image, and one label where one view is left.
  assert (labels[6] == -1).all() and (scores[6] == 0).all()
  assert (labels[7] >= 0).sum() == 1
  # Two of five views are equal, so that no image has five labels.
  counts = (labels >= 0).sum(1)
  assert counts.max() == min(num_labels, 4) and len(set(counts)) > 2


def unit_rows(rows):
  norm = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
  good = np.isfinite(norm) & (norm > 0)
  return np.where(good, rows / np.where(good, norm, 1), 0)


@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_pursuit_of_the_mean_of_the_views_without_what_all_share(shape):
  views, centers = make()
  views, centers = views + 2.0, unit_rows(centers + 2.0)  # All share much.
  mesh = sharding.make_mesh(*shape)
  images = rules.Images(views[:, 0], views.reshape(-1, DIM), NUM_VIEWS)
  labels, scores = joined('pursuit', images, centers, 3, mesh)
  rows = unit_rows(unit_rows(views).mean(1))
  centered = unit_rows(centers - centers.mean(0))
  for i, row in enumerate(rows):
    if not row.any():
      assert (labels[i] == -1).all()
      continue
    residual = unit_rows(row - centers.mean(0))
    for place, (label, score) in enumerate(zip(labels[i], scores[i])):
      products = centered @ residual
      products[labels[i][:place]] = -1
      assert label == products.argmax()
      assert score == pytest.approx(products[label], abs=1e-5)
      residual = residual - products[label] * centered[label]
  found = joined('pursuit', rules.Images(views[:, 1]), centers, 1, mesh)
  products = unit_rows(unit_rows(views[:, 1]) - centers.mean(0)) @ centered.T
  good = found[0][:, 0] >= 0
  assert good.sum() == np.isfinite(views[:, 1]).all(1).sum()
  np.testing.assert_array_equal(found[0][good, 0], products[good].argmax(1))


def test_the_best_stay_and_ties_go_to_the_lower_center():
  labels = np.int32([[7, 2, 5, 2], [4, 3, 9, 1], [0, 0, 0, 0]])
  scores = np.float32(
    [[0.5, 0.1, 0.5, 0.7], [0.2, 0.2, 0.9, 0.2], [0, -0.3, 0, -0.1]]
  )
  found = rules.unite(labels, scores, 3)
  assert found[0].tolist() == [[2, 5, 7], [9, 1, 3], [0, -1, -1]]
  np.testing.assert_allclose(
    found[1], [[0.7, 0.5, 0.5], [0.9, 0.2, 0.2], [-0.1, 0, 0]]
  )


def test_no_image_has_no_label():
  views, centers = make()
  labels, scores = run(views[:0], centers, 3)
  assert labels.shape == scores.shape == (0, 3)


def test_nearest_gives_a_zero_row_no_label():
  views, centers = make()
  rows = views[:, 0]
  mesh = sharding.make_mesh()
  labels, scores = joined('nearest', rules.Images(rows), centers, 4, mesh)
  good = np.flatnonzero(rows.any(1))
  unit = rows[good] / np.linalg.norm(rows[good], axis=1, keepdims=True)
  expected = np.argsort(-(unit @ centers.T), axis=1)[:, :4]
  np.testing.assert_array_equal(labels[good], expected)
  assert (labels[[3, 6]] == -1).all() and (scores[[3, 6]] == 0).all()


@pytest.mark.parametrize('lengths', [[0, 5, 0, 1, 9], [15], [1] * 15, [3, 4]])
@pytest.mark.parametrize('old', [[15], [4, 4, 4, 3], [7, 8]])
def test_a_stream_is_cut_anew_in_order(lengths, old):
  labels = np.arange(30, dtype=np.int32).reshape(15, 2)
  stops = np.cumsum(old)
  pieces = (
    (labels[stop - n : stop], labels[stop - n : stop] / np.float32(2))
    for n, stop in zip(old, stops)
  )
  found = list(rules.recut(pieces, lengths, 2))
  assert [len(piece) for piece, _ in found] == lengths
  together = np.concatenate([piece for piece, _ in found])
  np.testing.assert_array_equal(together, labels[: sum(lengths)])
  np.testing.assert_array_equal(
    np.concatenate([scores for _, scores in found]), together / 2
  )


def test_views_of_chunks_that_cut_an_image_in_two(monkeypatch):
  views, centers = make()
  expected = run(views, centers, 3)
  stream = rules.kmeans.nearest_in_chunks

  def shorter(rows, *args, **options):
    whole = list(stream(rows, *args, **options))
    return rules.recut(whole, [7] * 26 + [3], 1)  # An image has 5 views.

  monkeypatch.setattr(rules.kmeans, 'nearest_in_chunks', shorter)
  monkeypatch.setattr(rules, '_IMAGES', 4)
  np.testing.assert_equal(run(views, centers, 3), expected)


def test_every_choice_has_a_rule():
  assert set(rules.RULES) == set(choices.RULES)
