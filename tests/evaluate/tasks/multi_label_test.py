"""Several labels an image: the digits' attributes, the objects of scenes."""

import dataclasses

import numpy as np
import pytest
from sklearn import linear_model
from sklearn import metrics
import tensorflow_datasets as tfds

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.config import presets
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


def keep_predictions(monkeypatch):
  """Returns a list that gets what `linear.predict` returns."""
  kept = []
  predict = linear.predict

  def spy(*args, **kwargs):
    kept.extend(predict(*args, **kwargs))
    return tuple(kept)

  monkeypatch.setattr(linear, 'predict', spy)
  return kept


def test_attributes_are_those_of_the_digit(data):
  even, prime, loop, above = data.test.hot().T.astype(bool)
  digit = data.test.labels
  np.testing.assert_array_equal(even, digit % 2 == 0)
  np.testing.assert_array_equal(prime, np.isin(digit, [2, 3, 5, 7]))
  np.testing.assert_array_equal(loop, np.isin(digit, [0, 6, 8, 9]))
  np.testing.assert_array_equal(above, digit > 4)


def test_scores(data, tiny_config, monkeypatch):
  kept = keep_predictions(monkeypatch)
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


@pytest.fixture(scope='module', name='scenes')
def fixture_scenes():
  """Scenes with features that know the objects, the small ones less well."""
  config = config_lib.default()
  presets.scenes(config)
  dataset = config.evaluate.datasets.scenes
  rng = np.random.default_rng(0)
  splits = {}
  for split, count in (('train', 150), ('validation', 50), ('test', 120)):
    source = sources.make(dataset, f'{split}[:{count}]')
    x = rng.normal(0, 0.3, (count, 10))
    for row, i in zip(x, range(count)):
      left, top, right, bottom = source[i]['boxes'].T
      area = (right - left) * (bottom - top) / 64**2
      np.add.at(row, source[i]['box_labels'], 10 * area)
    splits[split] = features.Split(
      x.astype(np.float32), np.full(count, -1), np.arange(count), source
    )
  data = features.Data(
    **splits, num_classes=0, mesh=sharding.make_mesh(), config=dataset
  )
  return data, config


def test_objects_are_found_by_size_and_number(scenes, monkeypatch):
  data, config = scenes
  kept = keep_predictions(monkeypatch)
  found = multi_label.run(data, config)
  exact, objects = [], []
  for i, logits in enumerate(kept[0]):
    record = data.test.source[i]
    best = np.argsort(-logits)[: len(record['attributes'])]
    exact.append(set(best) == set(record['attributes'].tolist()))
    for box, label in zip(record['boxes'], record['box_labels']):
      area = round((box[2] - box[0]) * (box[3] - box[1]))
      objects.append((i, label in best, area, len(record['boxes'])))
  image, right, area, number = np.array(objects).T
  low, high = np.quantile(area, (1 / 3, 2 / 3))
  groups = {
    'small': area <= low,
    'medium': (low < area) & (area <= high),
    'large': area > high,
    'of_2': number == 2,
    'of_3_to_4': (number == 3) | (number == 4),
    'of_5_up': number > 4,
  }
  assert found['exact_set'] == pytest.approx(np.mean(exact))
  assert found['exact_set_count'] == 120
  assert {k for k in found if k.startswith('recall')} == {
    f'recall_{name}{end}'
    for name in groups
    for end in ('', '_low', '_high', '_count')
  }
  for name, group in groups.items():
    name = f'recall_{name}'
    assert found[name] == pytest.approx(right[group].mean()), name
    low, high = found[f'{name}_low'], found[f'{name}_high']
    assert 0 <= low <= found[name] <= high <= 1
    # Only where all samples agree, as where all objects are found.
    assert low < high or found[name] in (0, 1)
    assert found[f'{name}_count'] == len(np.unique(image[group]))
  assert found['recall_small'] + 0.1 < found['recall_large']


def test_without_boxes_there_is_no_recall(scenes):
  data, config = scenes
  dataset = data.config.copy_and_resolve_references()
  dataset.boxes_key = ''
  found = multi_label.run(dataclasses.replace(data, config=dataset), config)
  assert 'exact_set' in found
  assert not any(name.startswith('recall') for name in found)


def test_ignored_objects_are_not_counted(scenes):
  """Objects whose label is neither there nor not, or has no number."""
  data, _ = scenes
  record = {
    'image': data.test.source[0]['image'],
    'boxes': np.float32([[0, 0, 8, 8], [0, 0, 32, 64], [0, 0, 9, 9]]),
    'box_labels': np.array([2, 1, -1]),
  }
  split = dataclasses.replace(data.test, records=np.arange(1), source=[record])
  found = multi_label._objects(np.array([[0, 1, -1, 1]]), split)
  assert [x.tolist() for x in found] == [[0], [1], [0.5]]
