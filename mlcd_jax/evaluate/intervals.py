"""Confidence intervals of the scores, all at 95 %.

Shapes: N items.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats

# Bootstrap samples; 25 of their means lie beyond each end of the interval.
_RESAMPLES = 1_000


def bootstrap(values: np.ndarray, *, seed: int) -> dict[str, float]:
  """Returns the mean of one value per item with its bootstrap interval.

  Args:
    values: [N], such as 1 for a right prediction and 0 for a wrong one.
    seed: the seed of the resampling.

  Returns:
    The mean under '', the ends of the interval under '_low' and '_high', and N
    under '_count'. The caller appends each key to the name of the metric.
  """
  rng = np.random.default_rng(seed)
  means = [rng.choice(values, len(values)).mean() for _ in range(_RESAMPLES)]
  low, high = np.percentile(means, (2.5, 97.5))
  return {
    '': float(values.mean()),
    '_low': float(low),
    '_high': float(high),
    '_count': len(values),
  }


def bootstrap_of(
  metric: Callable[[np.ndarray, np.ndarray], float],
  scores: np.ndarray,
  labels: np.ndarray,
  *,
  seed: int,
) -> dict[str, float]:
  """Returns any metric of items with its bootstrap interval.

  Args:
    metric: a function (scores, labels) -> value. Samples for which it is NaN
      are left out of the interval.
    scores: [N, ...].
    labels: [N, ...].
    seed: the seed of the resampling.

  Returns:
    The value, the interval and N, under the keys of `bootstrap`.
  """
  rng = np.random.default_rng(seed)
  values = np.zeros(_RESAMPLES)
  for i in range(_RESAMPLES):
    rows = rng.integers(0, len(labels), len(labels))
    values[i] = metric(scores[rows], labels[rows])
  values = values[np.isfinite(values)]
  low, high = (
    np.percentile(values, (2.5, 97.5)) if len(values) else [np.nan] * 2
  )
  return {
    '': float(metric(scores, labels)),
    '_low': float(low),
    '_high': float(high),
    '_count': len(labels),
  }


def over_draws(values: np.ndarray) -> dict[str, float]:
  """Returns the mean over repeated draws with its Student's t interval.

  Args:
    values: [n] with n > 1, one score per draw.

  Returns:
    The mean, the interval and n, under the keys of `bootstrap`.
  """
  half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
  mean = float(np.mean(values))
  return {
    '': mean,
    '_low': mean - float(half),
    '_high': mean + float(half),
    '_count': len(values),
  }
