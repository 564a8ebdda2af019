"""Agreement with true labels, by hand."""

import numpy as np
import pytest

from mlcd_jax.page import quality


def test_agreement():
  clusters = np.array([5, 5, 5, 9, 9])
  assert quality.agreement(clusters, np.array([1, 1, 0, 0, 0]))[
    'purity'
  ] == pytest.approx(4 / 5)
  assert quality.agreement(clusters, np.array([3, 3, 3, 1, 1])) == {
    'purity': 1.0,
    'nmi': pytest.approx(1),
  }
  unrelated = quality.agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
  assert unrelated['nmi'] == pytest.approx(0, abs=1e-9)


def test_majority():
  assert quality.majority({1: 4, 2: 4, 3: 0}) == 4
  assert quality.majority({1: 4, 2: 0}) == 0  # The lower of equals.
  assert quality.majority({}) is None


def test_ranks():
  # Row -> class. Rows 10 and 11 are asked about.
  members = {
    0: {10: 1},  # Only the image itself: names none.
    1: {11: 1, 3: 2, 4: 2},
    2: {5: 1, 6: 1},
    3: {7: 2},
  }
  labels = np.array([[0, 2, 3], [1, 2, -1]])
  found = quality.ranks(labels, np.array([1, 1]), members, np.array([10, 11]))
  assert found['right'] == [0, 1, 0]
  assert found['silent'] == [0.5, 0, 0.5]
  assert found['any'] == [0, 1, 1]
  assert found['wrong_first'] == 0.5
  assert found['rescued'] == 1.0
  assert found['images'] == 2


def test_an_image_does_not_vote_for_itself():
  found = quality.ranks(
    np.array([[0]]), np.array([1]), {0: {10: 1, 3: 2}}, np.array([10])
  )
  assert found['right'] == [0]
  assert found['rescued'] == 0


def test_nothing_to_rescue():
  found = quality.ranks(
    np.array([[0]]), np.array([1]), {0: {3: 1}}, np.array([10])
  )
  assert found['rescued'] is None
