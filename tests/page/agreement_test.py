"""Agreement with true labels, by hand."""

import numpy as np
import pytest

from mlcd_jax.page import agreement
from mlcd_jax.page import browser
from mlcd_jax.page import clusters
from mlcd_jax.runtime import files


def test_agreement():
  clusters = np.array([5, 5, 5, 9, 9])
  assert agreement.agreement(clusters, np.array([1, 1, 0, 0, 0]))[
    'purity'
  ] == pytest.approx(4 / 5)
  assert agreement.agreement(clusters, np.array([3, 3, 3, 1, 1])) == {
    'purity': 1.0,
    'nmi': pytest.approx(1),
  }
  unrelated = agreement.agreement(
    np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
  )
  assert unrelated['nmi'] == pytest.approx(0, abs=1e-9)


def test_majority():
  assert agreement.majority({1: 4, 2: 4, 3: 0}) == 4
  assert agreement.majority({1: 4, 2: 0}) == 0  # The lower of equals.
  assert agreement.majority({}) is None


def test_ranks():
  # Row -> class. Rows 10 and 11 are asked about.
  members = {
    0: {10: 1},  # Only the image itself: names none.
    1: {11: 1, 3: 2, 4: 2},
    2: {5: 1, 6: 1},
    3: {7: 2},
  }
  labels = np.array([[0, 2, 3], [1, 2, -1]])
  found = agreement.ranks(labels, np.array([1, 1]), members, np.array([10, 11]))
  assert found['right'] == [0, 1, 0]
  assert found['silent'] == [0.5, 0, 0.5]
  assert found['any'] == [0, 1, 1]
  assert found['wrong_first'] == 0.5
  assert found['rescued'] == 1.0
  assert found['images'] == 2


def test_an_image_does_not_vote_for_itself():
  found = agreement.ranks(
    np.array([[0]]), np.array([1]), {0: {10: 1, 3: 2}}, np.array([10])
  )
  assert found['right'] == [0]
  assert found['rescued'] == 0


def test_nothing_to_rescue():
  found = agreement.ranks(
    np.array([[0]]), np.array([1]), {0: {3: 1}}, np.array([10])
  )
  assert found['rescued'] is None


class Rows:
  """Embedded images and their source, which says the class of some."""

  num_classes = 3

  def __init__(self, classes):
    self.classes = classes

  def __getitem__(self, row):
    return {'label': int(self.classes[row])}

  def keys(self):
    return np.array([f'{row:03d}'.encode() for row in range(len(self.classes))])

  def metadata(self, rows):
    return [f'{row:03d}' for row in rows], [''] * len(rows)


@pytest.mark.parametrize('missing', ['half', 'a class', 'all but one'])
def test_images_without_a_class_count_for_nothing(missing, tmp_path):
  rng = np.random.default_rng(0)
  classes = rng.integers(0, 3, 60)
  labels = np.stack([(classes + rng.integers(0, 2, 60)) % 4, (classes + 2) % 4])
  labels = labels.T.astype(np.int32)
  known = {
    'half': np.arange(60) % 2 == 0,
    'a class': classes != 2,
    'all but one': classes == 1,
  }[missing]

  def found(folder, labels, classes):
    files.write_npy(folder / 'labels_00000.npy', labels)
    files.write_npy(folder / 'scores_00000.npy', np.ones(labels.shape, 'f2'))
    shards, rows = clusters.Shards(folder, [len(labels)]), Rows(classes)
    inputs = browser.Inputs(rows, rows, shards, np.eye(4), 2, 0)
    statistics = clusters.statistics(shards, 4)
    return browser._quality(inputs, statistics, np.arange(len(labels)))

  for name in 'ab':
    (tmp_path / name).mkdir()
  partly = found(tmp_path / 'a', labels, np.where(known, classes, -1))
  alone = found(tmp_path / 'b', labels[known], classes[known])
  assert partly == alone
  assert partly['counted'] == partly['images'] == known.sum()
