"""Differences over seeds and test images, and the correction for many."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import paired


def _mean(scores, labels):
  del labels
  return float(scores.mean())


def test_jackknife_of_a_mean_gives_its_standard_error():
  rng = np.random.default_rng(0)
  values = rng.random(paired.GROUPS)  # One image in a group.
  found = paired.difference(
    [values.mean()] * 2,
    [0.0] * 2,
    np.stack([paired.without_groups(_mean, values, values)] * 2),
    np.zeros((2, paired.GROUPS)),
  )
  # The seeds agree, so that only the images are left.
  freedom = paired.GROUPS - 1
  expected = scipy.stats.t.ppf(0.975, freedom) * scipy.stats.sem(values)
  np.testing.assert_allclose(found.half, expected)
  np.testing.assert_allclose(found.mean, values.mean())


def test_without_images_that_differ_it_is_the_paired_t_test():
  ours, theirs = [0.8, 0.9, 0.85], [0.7, 0.72, 0.8]
  same = np.zeros((3, paired.GROUPS))
  found = paired.difference(ours, theirs, same, same)
  expected = scipy.stats.ttest_rel(ours, theirs)
  np.testing.assert_allclose(found.p, expected.pvalue)
  interval = expected.confidence_interval()
  np.testing.assert_allclose(found.mean - found.half, interval.low)


def test_no_difference_has_p_1():
  same = np.ones((2, paired.GROUPS))
  found = paired.difference([0.5] * 2, [0.5] * 2, same, same)
  assert (found.mean, found.half, found.p) == (0, 0, 1)


def test_chance_finds_a_difference_in_one_of_twenty():
  """Two equal encoders that err at random, on images that are hard at random.

  The variances of seeds and images are estimated together, so that the share
  below 5 % is near 5 %, and not above 8.
  """
  rng = np.random.default_rng(1)
  below = 0
  for _ in range(400):
    hard = rng.random(500)
    # [encoder, seed, image]; a seed's quality varies, too.
    quality = rng.normal(0, 0.02, (2, 5, 1))
    right = (rng.random((2, 5, 500)) < hard + quality).astype(float)
    without = [
      [paired.without_groups(_mean, row, row) for row in rows] for rows in right
    ]
    found = paired.difference(*right.mean(axis=2), *map(np.array, without))
    below += found.p < 0.05
  assert 0.01 < below / 400 < 0.08


@pytest.mark.parametrize(
  ('p', 'expected'),
  [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.5, 0.9], [1.0, 1.0]),
    ([0.02], [0.02]),
  ],
)
def test_holm(p, expected):
  np.testing.assert_allclose(paired.holm(p), expected)
