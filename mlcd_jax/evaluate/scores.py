"""Metrics of scores against labels; NaN where there is nothing to measure.

Where labels say whether something is there, they are 1 or True and 0 or False;
-1 is neither, and such an item is left out of the class, as the VOC development
kit leaves out images with nothing but difficult objects of it.

Shapes: M items, C classes.
"""

import numpy as np
import scipy.stats


def right(scores_MC: np.ndarray, labels_M: np.ndarray) -> np.ndarray:
  """Float [M]: 1 where the highest score is at an item's class."""
  return (scores_MC.argmax(1) == labels_M).astype(np.float64)


def top1_top5(scores_MC: np.ndarray, labels_M: np.ndarray) -> np.ndarray:
  """Float [M] whose mean is that of top-1 and top-5 accuracy (Kinetics-700).

  Of equal scores the lower class comes first.
  """
  own_M1 = np.take_along_axis(scores_MC, labels_M[:, None], axis=1)
  lower = np.arange(scores_MC.shape[1])[None] < labels_M[:, None]
  ahead = (scores_MC > own_M1) | ((scores_MC == own_M1) & lower)
  rank = ahead.sum(1)
  return ((rank < 1) + (rank < 5).astype(np.float64)) / 2


def mean(values_M: np.ndarray, labels_M: np.ndarray) -> float:
  """Mean over the items."""
  del labels_M
  return float(np.mean(values_M))


def mean_per_class(values_M: np.ndarray, labels_M: np.ndarray) -> float:
  """Mean of the means of the classes that occur."""
  _, place_M, count = np.unique(
    labels_M, return_inverse=True, return_counts=True
  )
  return float(np.mean(np.bincount(place_M, values_M) / count))


def roc_auc(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """Area under the ROC curve; NaN with one class only."""
  scores_M, positive = _known(scores_M, positive_M)
  count = positive.sum()
  if not 0 < count < len(positive):
    return float('nan')
  ranks = scipy.stats.rankdata(scores_M)[positive].sum()
  area = ranks - count * (count + 1) / 2
  return float(area / (count * (len(positive) - count)))


def _known(scores_M, positive_M):
  """Scores of the items that are positive or negative, and which are."""
  positive_M = np.asarray(positive_M)
  known_M = positive_M >= 0
  return scores_M[known_M], positive_M[known_M] > 0


def _curve(scores_M, positive_M):
  """Recall and precision at each distinct score, from the highest."""
  scores_M, positive_M = _known(scores_M, positive_M)
  order = np.argsort(-scores_M, kind='stable')
  found = np.cumsum(positive_M[order])
  last = np.flatnonzero(np.append(np.diff(scores_M[order]) != 0, True))
  return found[last] / found[-1], found[last] / (last + 1)


def average_precision(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """Mean precision at the recalls reached; NaN without a positive."""
  if not np.any(np.asarray(positive_M) > 0):
    return float('nan')
  recall, precision = _curve(scores_M, positive_M)
  return float(np.sum(np.diff(recall, prepend=0) * precision))


def average_precision_11(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """As above, of the best precision at recalls 0, 0.1 .. 1 (VOC2007)."""
  if not np.any(np.asarray(positive_M) > 0):
    return float('nan')
  recall, precision = _curve(scores_M, positive_M)
  best = np.maximum.accumulate(precision[::-1])[::-1]
  # The first place with at least that recall; rounding must not miss it.
  place = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)
  return float(np.mean(best[place]))


def mean_average_precision(
  scores_MC: np.ndarray, hot_MC: np.ndarray, *, of=average_precision
) -> float:
  """Mean of `of` over the classes with a positive."""
  each = [of(s, h) for s, h in zip(scores_MC.T, hot_MC.T) if np.any(h > 0)]
  return float(np.mean(each)) if each else float('nan')


def f1(chosen_MC: np.ndarray, hot_MC: np.ndarray, *, per_class: bool) -> float:
  """F1 of several labels an image.

  Args:
    chosen_MC: bool, what was predicted.
    hot_MC: what is there.
    per_class: CF1, from precision and recall averaged over the classes with a
      positive; otherwise OF1, from those over all decisions.
  """
  axis = 0 if per_class else None
  positive_MC = hot_MC > 0
  right = (chosen_MC & positive_MC).sum(axis)
  predicted = (chosen_MC & (hot_MC >= 0)).sum(axis)
  there = positive_MC.sum(axis)
  known = np.atleast_1d(there > 0)
  if not known.any():
    return float('nan')
  right, predicted, there = (
    np.atleast_1d(x)[known] for x in (right, predicted, there)
  )
  precision = np.mean(right / np.maximum(predicted, 1))
  recall = np.mean(right / there)
  if precision + recall == 0:
    return 0.0
  return float(2 * precision * recall / (precision + recall))
