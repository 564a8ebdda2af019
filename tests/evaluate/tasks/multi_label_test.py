"""Several labels an image, from the digits' attributes."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn import metrics
import tensorflow_datasets as tfds

from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.data import tfds as tfds_source
from mlcd_jax.data import tfds_features
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import scores
from mlcd_jax.evaluate.tasks import linear
from mlcd_jax.evaluate.tasks import multi_label
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


def voc(*images):
  """A source as the preset opens VOC, of (labels, those not difficult)."""
  keys = datasets.NAMED['voc2007'].keys
  return tfds_source.TfdsSource(
    data=[
      {'image': b'', 'labels': np.array(a), 'labels_no_difficult': np.array(b)}
      for a, b in images
    ],
    split='test',
    image_key='image',
    label_key='',
    caption_key='',
    class_names=(),
    attributes_key=keys['attributes_key'],
    ignored_key=keys['ignored_key'],
    num_attributes=4,
  )


def test_difficult_objects_are_neither_there_nor_not():
  # Of class 3: only difficult ones, some difficult, none; and an empty image.
  source = voc(([0, 3], [0]), ([3, 1], [3, 1]), ([0], [0]), ([], []), ([2], []))
  split = features.Split(np.zeros((5, 1)), -np.ones(5), np.arange(5), source)
  np.testing.assert_array_equal(
    split.hot(),
    [[1, 0, 0, -1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, -1, 0]],
  )
  assert split.labelled(several=True) is split


def test_an_image_without_any_known_attribute_is_left_out():
  source = voc(([-1], [-1]), ([2, -1], [2, -1]), ([0], [0]))
  split = features.Split(np.zeros((3, 1)), -np.ones(3), np.arange(3), source)
  np.testing.assert_array_equal(
    split.hot(), [[-1] * 4, [0, 0, 1, 0], [1, 0, 0, 0]]
  )
  assert split.labelled(several=True).records.tolist() == [0, 1]


def test_tfds_has_the_features_of_the_preset(tmp_path):
  preset = datasets.NAMED['voc2007']
  builder = tfds.builder(
    preset.tfds, data_dir=tmp_path, file_format='array_record'
  )
  for field in ('attributes_key', 'ignored_key'):
    key = preset.keys[field]
    assert tfds_features.num_attributes(builder, key, field) == 20


def test_the_probe_of_a_class_does_not_see_what_it_ignores(monkeypatch):
  x, labels = blobs.draw(200, dim=5, noise=2)
  hot = (labels[:, None] == np.arange(3)).astype(np.int8)
  hot[np.random.default_rng(0).random(hot.shape) < 0.4] = -1
  monkeypatch.setattr(linear, 'search', lambda values: 1.0)
  found, _ = linear.predict(
    x, hot, linear.hold_out(200, 0), x,
    metric=scores.mean_average_precision, num_outputs=3, loss='sigmoid',
    mesh=sharding.make_mesh(),
  )  # fmt: skip
  for c in range(3):
    known = hot[:, c] >= 0
    theirs = linear_model.LogisticRegression(C=0.1, tol=1e-8, max_iter=1_000)
    theirs.fit(x[known], hot[known, c])
    np.testing.assert_allclose(
      found[:, c], theirs.decision_function(x), atol=2e-3
    )
