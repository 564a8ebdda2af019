"""Several labels an image, from the digits' attributes."""

import numpy as np
import pytest
from sklearn import metrics

from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import linear
from mlcd_jax.evaluate import multi_label
from tests.evaluate import blobs


@pytest.fixture(name='data')
def fixture_data(tiny_config):
  dataset = tiny_config.evaluate.datasets.digits
  extract = features.Extractor(encoders.raw_pixels(), 'raw', 64)
  train, test = (
    extract(sources.make(dataset, split), split)
    for split in (dataset.train_split, dataset.test_split)
  )
  return features.Data(train, test, 10, sharding.make_mesh(), config=dataset)


def test_attributes_are_those_of_the_digit(data):
  even, prime, loop, above = data.test.hot().T.astype(bool)
  digit = data.test.labels
  np.testing.assert_array_equal(even, digit % 2 == 0)
  np.testing.assert_array_equal(prime, np.isin(digit, [2, 3, 5, 7]))
  np.testing.assert_array_equal(loop, np.isin(digit, [0, 6, 8, 9]))
  np.testing.assert_array_equal(above, digit > 4)


def test_scores(data, tiny_config, monkeypatch):
  kept = []
  predict = linear.predict

  def spy(*args, **kwargs):
    kept.extend(predict(*args, **kwargs))
    return tuple(kept)

  monkeypatch.setattr(linear, 'predict', spy)
  found = multi_label.run(data, tiny_config)
  assert found['mAP'] == pytest.approx(
    metrics.average_precision_score(data.test.hot(), kept[0])
  )
  assert found['OF1'] == pytest.approx(
    metrics.f1_score(data.test.hot(), kept[0] > 0, average='micro')
  )
  assert 0.7 < found['CF1_low'] < found['CF1'] < found['CF1_high'] < 1
  assert found['mAP_count'] == 100


def test_one_label_an_image_is_another_task(tiny_config):
  rows = blobs.draw(20)
  assert multi_label.run(blobs.data(rows, rows), tiny_config) == {}


def test_eleven_point_map_takes_the_attributes(data, tiny_config):
  data.config.metric = 'map_11_point'
  found = linear.run(data, tiny_config)
  assert 0.7 < found['map_11_point'] <= 1
