"""Intervals beside the scores."""

from collections.abc import Callable

import numpy as np
import scipy.stats

_RESAMPLES = 1_000


def bootstrap(values: np.ndarray, *, seed: int) -> dict[str, float]:
  """Mean of one value per item, with its 95 % bootstrap interval.

  Args:
    values: [N], such as 1 where a prediction is right and 0 where not.
    seed: of the resampling.

  Returns:
    {'': mean, '_low', '_high', '_count'}, to be joined to a metric's name.
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
  """As `bootstrap`, of any metric of items.

  Args:
    metric: (scores, labels) -> value; NaN of a resample is left out.
    scores: [N, ...].
    labels: [N, ...].
    seed: of the resampling.
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
  """Mean over repeated draws, with its 95 % interval by Student's t.

  Args:
    values: [n] with n > 1, one score a draw.

  Returns:
    As `bootstrap`; the count is that of the draws.
  """
  half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
  mean = float(np.mean(values))
  return {
    '': mean,
    '_low': mean - float(half),
    '_high': mean + float(half),
    '_count': len(values),
  }
