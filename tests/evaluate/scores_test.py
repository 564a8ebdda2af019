"""Metrics against scikit-learn's, with ties and classes that do not occur."""

import numpy as np
import pytest
from sklearn import metrics

from mlcd_jax.evaluate import scores


def draw(seed, classes=6, items=60, absent=(2,)):
  """Scores with many ties, and labels that leave some classes out."""
  rng = np.random.default_rng(seed)
  labels = rng.choice([c for c in range(classes) if c not in absent], items)
  found = rng.integers(0, 4, (items, classes)).astype(np.float64)
  found[np.arange(items), labels] += 1
  return found, labels


@pytest.mark.parametrize('seed', range(5))
def test_classes(seed):
  found, labels = draw(seed)
  predicted = found.argmax(1)
  assert scores.right(found, labels).mean() == metrics.accuracy_score(
    labels, predicted
  )
  with pytest.warns(UserWarning, match='y_pred'):
    wanted = metrics.balanced_accuracy_score(labels, predicted)
  assert scores.mean_per_class(
    scores.right(found, labels), labels
  ) == pytest.approx(wanted)


@pytest.mark.parametrize('seed', range(5))
def test_top1_and_top5(seed):
  found, labels = draw(seed, classes=9)
  found += np.random.default_rng(seed).random(found.shape)  # No ties.
  top = [
    metrics.top_k_accuracy_score(labels, found, k=k, labels=range(9))
    for k in (1, 5)
  ]
  assert scores.top1_top5(found, labels).mean() == pytest.approx(np.mean(top))
  few = scores.top1_top5(found[:, :3], labels % 3)
  assert set(few) == {0.5, 1.0}  # All three are among the first five.


@pytest.mark.parametrize('seed', range(5))
def test_ranking_with_ties(seed):
  found, labels = draw(seed)
  one, positive = found[:, 0], labels == 0
  assert scores.roc_auc(one, positive) == pytest.approx(
    metrics.roc_auc_score(positive, one)
  )
  assert scores.average_precision(one, positive) == pytest.approx(
    metrics.average_precision_score(positive, one)
  )
  hot = np.eye(6, dtype=int)[labels]
  there = [0, 1, 3, 4, 5]
  assert scores.mean_average_precision(found, hot) == pytest.approx(
    metrics.average_precision_score(hot[:, there], found[:, there])
  )
  precision, recall, _ = metrics.precision_recall_curve(positive, one)
  eleven = [precision[recall >= t - 1e-9].max() for t in np.linspace(0, 1, 11)]
  # scikit-learn adds a precision of 1 at recall 0, which no score reaches.
  eleven[0] = precision[:-1].max()
  assert scores.average_precision_11(one, positive) == pytest.approx(
    np.mean(eleven)
  )


def test_one_class_only_is_undefined():
  one = np.array([0.1, 0.5, 0.5])
  assert np.isnan(scores.roc_auc(one, np.ones(3)))
  assert np.isnan(scores.roc_auc(one, np.zeros(3)))
  assert np.isnan(scores.average_precision(one, np.zeros(3)))
  assert np.isnan(scores.average_precision_11(one, np.zeros(3)))
  assert np.isnan(scores.mean_average_precision(one[:, None], np.zeros((3, 1))))
  assert scores.average_precision(one, np.ones(3)) == 1.0
  assert np.isnan(
    scores.f1(np.ones((3, 1), bool), np.zeros((3, 1), bool), per_class=True)
  )


@pytest.mark.parametrize('seed', range(5))
def test_f1(seed):
  rng = np.random.default_rng(seed)
  chosen, hot = rng.random((2, 50, 4)) < 0.3
  assert scores.f1(chosen, hot, per_class=False) == pytest.approx(
    metrics.f1_score(hot, chosen, average='micro')
  )
  # Of the mean precision and recall, not the mean of the F1s.
  p, r = (
    score(hot, chosen, average='macro', zero_division=0)
    for score in (metrics.precision_score, metrics.recall_score)
  )
  assert scores.f1(chosen, hot, per_class=True) == pytest.approx(
    2 * p * r / (p + r)
  )
  assert scores.f1(~hot & False, hot, per_class=True) == 0


def test_an_ignored_item_by_hand():
  # From the highest: right, ignored, wrong, right; and one far behind.
  one = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
  labels = np.array([1, -1, 0, 1, -1])
  assert scores.average_precision(one, labels) == pytest.approx((1 + 2 / 3) / 2)
  # Recalls 0 to 0.5 with precision 1, above it 2 / 3.
  assert scores.average_precision_11(one, labels) == pytest.approx(
    (6 + 5 * 2 / 3) / 11
  )
  assert scores.roc_auc(one, labels) == 0.5
  chosen = (one > 0.5)[:, None]  # The second neither helps nor harms.
  for per_class in (False, True):
    found = scores.f1(chosen, labels[:, None], per_class=per_class)
    assert found == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
  assert np.isnan(scores.average_precision(one, np.minimum(labels, 0)))


@pytest.mark.parametrize('seed', range(5))
def test_ignored_items_are_left_out_of_their_class_alone(seed):
  found, _ = draw(seed)
  rng = np.random.default_rng(seed)
  hot = rng.choice([-1, 0, 1], found.shape, p=(0.3, 0.4, 0.3)).astype(np.int8)
  hot[:, 2] = np.minimum(hot[:, 2], 0)  # No positive: no part of the mean.
  each = [0, 1, 3, 4, 5]
  parts = {c: (hot[hot[:, c] >= 0, c], found[hot[:, c] >= 0, c]) for c in each}
  wanted = [metrics.average_precision_score(*parts[c]) for c in each]
  assert scores.mean_average_precision(found, hot) == pytest.approx(
    np.mean(wanted)
  )
  for c in each:
    y, z = parts[c]
    assert scores.roc_auc(found[:, c], hot[:, c]) == pytest.approx(
      metrics.roc_auc_score(y, z)
    )
    assert scores.average_precision_11(
      found[:, c], hot[:, c]
    ) == scores.average_precision_11(z, y)
  known = hot >= 0
  y, z = hot[known], found[known]
  assert scores.f1(found > 2, hot, per_class=False) == pytest.approx(
    metrics.f1_score(y, z > 2)
  )
  p, r = (
    np.mean([score(y, z > 2, zero_division=0) for y, z in parts.values()])
    for score in (metrics.precision_score, metrics.recall_score)
  )
  assert scores.f1(found > 2, hot, per_class=True) == pytest.approx(
    2 * p * r / (p + r)
  )


def test_highest_are_as_many_as_the_labels():
  found = np.array([[3, 1, 2, 0], [1, 1, 1, 1], [9, 2, 8, 1], [1, 2, 3, 4.0]])
  hot = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [-1, 1, -1, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(
    scores.highest(found, hot),
    # Of equal scores the lower class ranks first, and -1 is not ranked.
    [[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
  )
  np.testing.assert_array_equal(scores.exact_set(found, hot), [1, 0, 1, np.nan])


def test_exact_set_of_perfect_and_of_random_scores():
  rng = np.random.default_rng(0)
  hot = np.argsort(rng.random((4_000, 5)), 1) < 2
  assert scores.exact_set(hot.astype(float), hot).mean() == 1
  # One of the 10 pairs.
  found = scores.exact_set(rng.random(hot.shape), hot).mean()
  assert found == pytest.approx(0.1, abs=0.02)


def test_ratio():
  assert scores.ratio(np.array([1, 0, 2]), np.array([2, 1, 2])) == 0.6
  assert np.isnan(scores.ratio(np.zeros(2), np.zeros(2)))


def test_thirds_of_the_sizes():
  rng = np.random.default_rng(0)
  area = rng.permutation(np.arange(300) / 300)
  groups = scores.by_size(area)
  assert list(groups) == ['small', 'medium', 'large']
  assert [g.sum() for g in groups.values()] == [100, 100, 100]
  assert area[groups['small']].max() < area[groups['medium']].min()
  assert area[groups['medium']].max() < area[groups['large']].min()
  # Objects of the same size stay together.
  alike = scores.by_size(np.full(5, 0.1))
  assert [g.sum() for g in alike.values()] == [5, 0, 0]


def test_every_number_of_objects_is_in_one_group():
  number = np.arange(1, 8)
  groups = scores.by_number(number)
  np.testing.assert_array_equal(sum(g.astype(int) for g in groups.values()), 1)
  assert {k: number[g].tolist() for k, g in groups.items()} == {
    'of_1': [1],
    'of_2': [2],
    'of_3_to_4': [3, 4],
    'of_5_up': [5, 6, 7],
  }
