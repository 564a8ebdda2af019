"""Intervals beside the scores."""

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
