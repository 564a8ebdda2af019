"""Metrics of scores against labels; NaN if nothing can be measured.

Binary labels are 1 or True for positives and 0 or False for negatives. An item
with the label -1 is left out of that class, as the VOC development kit leaves
out images that have only difficult objects of a class.

Shapes: M items, C classes, O objects in the items.
"""

import numpy as np
import scipy.stats


def right(scores_MC: np.ndarray, labels_M: np.ndarray) -> np.ndarray:
  """Returns float [M]: 1 if the class of an item has the highest score."""
  return (scores_MC.argmax(1) == labels_M).astype(np.float64)


def top1_top5(scores_MC: np.ndarray, labels_M: np.ndarray) -> np.ndarray:
  """Returns float [M]: 1, 0.5 or 0 for each item.

  An item whose class is ranked first gets 1, and one ranked second to fifth
  0.5. The mean is therefore the average of top-1 and top-5 accuracy, the metric
  of Kinetics-700. Of classes with equal scores the lower one ranks first.
  """
  own_M1 = np.take_along_axis(scores_MC, labels_M[:, None], axis=1)
  lower = np.arange(scores_MC.shape[1])[None] < labels_M[:, None]
  ahead = (scores_MC > own_M1) | ((scores_MC == own_M1) & lower)
  rank = ahead.sum(1)
  return ((rank < 1) + (rank < 5).astype(np.float64)) / 2


def mean(values_M: np.ndarray, labels_M: np.ndarray) -> float:
  """Returns the mean over the items; it ignores the labels."""
  del labels_M
  return float(np.mean(values_M))


def mean_per_class(values_M: np.ndarray, labels_M: np.ndarray) -> float:
  """Returns the mean over the classes that occur of each class's mean."""
  _, place_M, count = np.unique(
    labels_M, return_inverse=True, return_counts=True
  )
  return float(np.mean(np.bincount(place_M, values_M) / count))


def roc_auc(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """Returns the area under the ROC curve.

  It is NaN unless there are both positives and negatives.
  """
  scores_M, positive = _known(scores_M, positive_M)
  count = positive.sum()
  if not 0 < count < len(positive):
    return float('nan')
  # The Mann-Whitney U statistic; ties get average ranks and count one half.
  ranks = scipy.stats.rankdata(scores_M)[positive].sum()
  area = ranks - count * (count + 1) / 2
  return float(area / (count * (len(positive) - count)))


def _known(scores_M, positive_M):
  """Removes the items with the label -1.

  Returns:
    The scores of the other items, and bools that are True for positives.
  """
  positive_M = np.asarray(positive_M)
  known_M = positive_M >= 0
  return scores_M[known_M], positive_M[known_M] > 0


def _curve(scores_M, positive_M):
  """Returns the recall and precision at each distinct score, highest first."""
  scores_M, positive_M = _known(scores_M, positive_M)
  order = np.argsort(-scores_M, kind='stable')
  found = np.cumsum(positive_M[order])
  # Items of equal score count together, so that their order does not matter.
  last = np.flatnonzero(np.append(np.diff(scores_M[order]) != 0, True))
  return found[last] / found[-1], found[last] / (last + 1)


def average_precision(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """Returns the area under the precision-recall curve, a step function.

  It is NaN without a positive.
  """
  if not np.any(np.asarray(positive_M) > 0):
    return float('nan')
  recall, precision = _curve(scores_M, positive_M)
  return float(np.sum(np.diff(recall, prepend=0) * precision))


def average_precision_11(scores_M: np.ndarray, positive_M: np.ndarray) -> float:
  """Returns the 11-point interpolated average precision of VOC2007.

  It is the mean, over the recalls 0, 0.1, ... 1, of the best precision at that
  recall or above. It is NaN without a positive.
  """
  if not np.any(np.asarray(positive_M) > 0):
    return float('nan')
  recall, precision = _curve(scores_M, positive_M)
  best = np.maximum.accumulate(precision[::-1])[::-1]
  # The first place with at least that recall. 1e-9 is for recalls such as 0.3
  # that are rounded differently on the two sides.
  place = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)
  return float(np.mean(best[place]))


def mean_average_precision(
  scores_MC: np.ndarray, hot_MC: np.ndarray, *, of=average_precision
) -> float:
  """Returns the mean of a metric over the classes that have a positive.

  Args:
    scores_MC: the scores of every class.
    hot_MC: the binary labels.
    of: a function (scores [M], labels [M]) -> value of one class.
  """
  each = [of(s, h) for s, h in zip(scores_MC.T, hot_MC.T) if np.any(h > 0)]
  return float(np.mean(each)) if each else float('nan')


def highest(scores_MC: np.ndarray, hot_MC: np.ndarray) -> np.ndarray:
  """Returns bool [M, C]: True for the n highest scores of an item.

  n is the item's number of labels, which is taken as known. Labels of -1 are
  left out of the ranking. Of equal scores the lower class ranks first.
  """
  ranked_MC = np.where(hot_MC < 0, -np.inf, scores_MC)
  order_MC = np.argsort(-ranked_MC, axis=1, kind='stable')
  rank_MC = np.argsort(order_MC, axis=1)
  return rank_MC < (hot_MC > 0).sum(1, keepdims=True)


def exact_set(scores_MC: np.ndarray, hot_MC: np.ndarray) -> np.ndarray:
  """Returns float [M]: 1 if an item's n highest scores are its n labels.

  An item without a label has NaN.
  """
  positive_MC = hot_MC > 0
  same = np.all(highest(scores_MC, hot_MC) == positive_MC, axis=1)
  return np.where(positive_MC.any(1), same.astype(np.float64), np.nan)


def ratio(part_M: np.ndarray, whole_M: np.ndarray) -> float:
  """Returns the sum of the parts as a share of the sum of the wholes."""
  whole = np.sum(whole_M)
  return float(np.sum(part_M) / whole) if whole else float('nan')


def by_size(area_O: np.ndarray) -> dict[str, np.ndarray]:
  """Divides objects into thirds by their share of the image's area.

  The thirds are those of the given objects, because data sets differ too much
  in their sizes for fixed limits: those of COCO, 1/300 and 3/100 of its images,
  would call every object of the scenes large. Objects of equal share stay
  together.

  Returns:
    Bool [O] for small, medium and large.
  """
  low, high = np.quantile(area_O, (1 / 3, 2 / 3))
  return {
    'small': area_O <= low,
    'medium': (area_O > low) & (area_O <= high),
    'large': area_O > high,
  }


def by_number(number_O: np.ndarray) -> dict[str, np.ndarray]:
  """Divides objects by the number of objects in their image.

  Returns:
    Bool [O] for 1, 2, 3 to 4, and 5 or more. These few groups have enough
    objects each, in scenes of 2 to 6 as in COCO's images of 7 on average.
  """
  return {
    'of_1': number_O == 1,
    'of_2': number_O == 2,
    'of_3_to_4': (number_O == 3) | (number_O == 4),
    'of_5_up': number_O >= 5,
  }


def f1(chosen_MC: np.ndarray, hot_MC: np.ndarray, *, per_class: bool) -> float:
  """Returns the F1 score of several labels per image.

  Args:
    chosen_MC: bool, the predictions.
    hot_MC: the binary labels.
    per_class: True for CF1, from the precision and recall averaged over the
      classes that have a positive. False for OF1, from the precision and recall
      over all predictions.
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
  # A class that is never predicted has the precision 0.
  precision = np.mean(right / np.maximum(predicted, 1))
  recall = np.mean(right / there)
  if precision + recall == 0:
    return 0.0
  return float(2 * precision * recall / (precision + recall))
