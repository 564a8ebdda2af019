"""Intervals cover as often as they say."""

import numpy as np
import pytest

from mlcd_jax.evaluate import intervals


def test_bootstrap_covers():
  rng = np.random.default_rng(0)
  covered = 0
  for seed in range(100):
    values = (rng.random(200) < 0.8).astype(np.float64)
    found = intervals.bootstrap(values, seed=seed)
    covered += found['_low'] <= 0.8 <= found['_high']
  assert 88 <= covered <= 100


def test_bootstrap_of_certainty():
  found = intervals.bootstrap(np.ones(10), seed=0)
  assert found == {'': 1.0, '_low': 1.0, '_high': 1.0, '_count': 10}


def test_over_draws_is_students_interval():
  found = intervals.over_draws(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
  assert found[''] == pytest.approx(0.3)
  # t(0.975, 4) = 2.7764; the standard error is 0.0707.
  assert found['_high'] - 0.3 == pytest.approx(2.7764 * 0.0707107, rel=1e-4)


def test_bootstrap_of_a_metric_covers():
  rng = np.random.default_rng(0)
  covered = 0
  for seed in range(40):
    values = rng.normal(size=(100, 1))
    found = intervals.bootstrap_of(
      lambda scores, labels: np.mean(scores[:, 0] - labels),
      values,
      np.ones(100),
      seed=seed,
    )
    covered += found['_low'] <= -1 <= found['_high']
  assert 34 <= covered <= 40
