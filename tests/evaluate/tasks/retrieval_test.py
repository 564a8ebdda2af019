"""Recalls and average precision against brute force, ties and lone classes."""

import numpy as np
import pytest

from mlcd_jax import sharding
from mlcd_jax.evaluate.tasks import retrieval


def rows(num, seed, dim=6):
  return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_recalls_with_several_captions_an_image():
  images, texts = rows(40, 0), rows(200, 1)
  texts += np.repeat(images, 5, axis=0)
  image_groups, text_groups = np.arange(40), np.repeat(np.arange(40), 5)
  for q, q_groups, g, g_groups in (
    (images, image_groups, texts, text_groups),
    (texts, text_groups, images, image_groups),
  ):
    found = retrieval.recalls(
      q, q_groups, g, g_groups, mesh=sharding.make_mesh()
    )
    scores = unit(q) @ unit(g).T
    for k in (1, 5, 10):
      expected = [
        group in g_groups[np.argsort(-row)[:k]]
        for row, group in zip(scores, q_groups)
      ]
      np.testing.assert_array_equal(found[f'recall{k}'], expected)
    assert 0 < found['recall1'].mean() < found['recall10'].mean()


def test_fewer_texts_than_ranks():
  found = retrieval.recalls(
    rows(3, 0),
    np.arange(3),
    rows(2, 1),
    np.array([0, 2]),
    mesh=sharding.make_mesh(),
  )
  np.testing.assert_array_equal(found['recall10'], [1, 0, 1])


@pytest.mark.parametrize('num', [50, 600])  # Less and more than a chunk.
def test_images_equal_brute_force(num):
  labels = np.random.default_rng(2).integers(0, 7, num)
  labels[0] = 7  # Alone: no query, but in every other's way.
  x = rows(num, 3) + np.eye(8, 6)[labels].astype(np.float32)
  found = retrieval.images(x, labels, mesh=sharding.make_mesh())
  scores = unit(x) @ unit(x).T
  first, precision = [], []
  for i in range(1, num):
    order = [j for j in np.argsort(-scores[i]) if j != i]
    right = labels[order] == labels[i]
    first.append(right[0])
    places = np.flatnonzero(right)
    precision.append(np.mean((np.arange(len(places)) + 1) / (places + 1)))
  np.testing.assert_array_equal(found['image_recall1'], first)
  np.testing.assert_allclose(found['image_map'], precision, rtol=1e-5)


def test_copies_find_each_other_not_themselves():
  x = np.repeat(rows(3, 0), 2, axis=0)
  labels = np.array([0, 0, 1, 1, 2, 3])
  found = retrieval.images(x, labels, mesh=sharding.make_mesh())
  np.testing.assert_array_equal(found['image_recall1'], [1, 1, 1, 1])
  np.testing.assert_array_equal(found['image_map'], [1, 1, 1, 1])


def test_without_labels_or_pairs_there_is_nothing():
  for labels in (np.arange(4), np.full(4, -1)):
    assert not retrieval.images(rows(4, 0), labels, mesh=sharding.make_mesh())


def test_texts_of_the_gallery():
  told = [['a', 'b'], ['a'], [], list('cdefgh')]
  groups = np.array([0, 0, 1, 1])
  texts, found = retrieval._texts(told, groups, by_class=True)
  assert texts == list('abcdefg') and found.tolist() == [0, 0, 1, 1, 1, 1, 1]
  texts, found = retrieval._texts(told, np.arange(4), by_class=False)
  assert texts == list('abacdefg')
  assert found.tolist() == [0, 0, 1, 3, 3, 3, 3, 3]
