"""Features that are no class, no image and no caption."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mlcd_jax import config as config_lib
from mlcd_jax.evaluate import stage
from mlcd_jax.runtime import errors
from tests.data import shards

_IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
_CLASS = tfds.features.ClassLabel(num_classes=4)
_FEATURES = {
  'image': _IMAGE,
  'images': tfds.features.Sequence(_IMAGE),
  'pixels': tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
  'class': _CLASS,
  'text': tfds.features.Text(),
  'several': tfds.features.Sequence(_CLASS),
  'group': tfds.features.FeaturesDict({'id': _CLASS}),
  'number': tfds.features.Scalar(dtype=np.int64),
  'score': tfds.features.Scalar(dtype=np.float32),
  'scores': tfds.features.Tensor(shape=(2,), dtype=np.float32),
  'objects': tfds.features.Sequence(
    {
      'bbox': tfds.features.BBoxFeature(),
      'pixels': tfds.features.BBoxFeature(bbox_format='YXYX'),
      'label': _CLASS,
    }
  ),
}


def _object(*shares, label):
  box = tfds.features.BBox(*shares)
  return {'bbox': box, 'pixels': box, 'label': label}


class MlcdTestFeatures(tfds.core.GeneratorBasedBuilder):
  """One of every kind."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict(_FEATURES)
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(4):
      yield (
        i,
        {
          'image': io.BytesIO(shards.jpeg(i)),
          'images': [io.BytesIO(shards.jpeg(i))],
          'pixels': np.zeros((2, 2, 3), np.uint8),
          'class': i,
          'text': f'person {i}',
          'several': list(range(i + 1)),
          'group': {'id': i},
          'number': 7308324466020115 + i,
          'score': 0.5,
          'scores': [0.5, 1.5],
          'objects': [
            # The image has 32 rows and 40 columns.
            _object(0.25, 0.5, 0.5, 0.75, label=3),
            _object(0.0, 0.0, 1.0, 1.0, label=1),
            _object(0.5, 0.1, 1.0, 0.2, label=3),
          ][:i],
        },
      )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  MlcdTestFeatures(
    data_dir=folder, file_format='array_record'
  ).download_and_prepare()
  return folder


def _opened(folder, **fields):
  fields = dict(data_dir=str(folder)) | fields
  return shards.opened('tfds', 'mlcd_test_features', **fields)[0]


_PROBLEMS = {
  'text': 'text',
  'several': 'a list',
  'group': 'a group of features',
  'score': 'of type Scalar',
  'scores': 'of type Tensor',
  'pixels': 'of type Tensor',
}


@pytest.mark.parametrize('key', _PROBLEMS)
def test_labels_that_are_no_class(folder, key):
  """Embedding and training need none."""
  source = _opened(folder, label_key=key)
  assert [source[i]['label'] for i in range(4)] == [-1] * 4
  assert sorted(source[i]['image'] for i in range(4)) == sorted(
    map(shards.jpeg, range(4))
  )
  assert source.num_classes == 0
  assert source.label_problem == _PROBLEMS[key]


@pytest.mark.parametrize('key', ['class', 'number', 'missing', ''])
def test_labels_that_are_classes_or_missing(folder, key):
  source = _opened(folder, label_key=key)
  labels = sorted(source[i]['label'] for i in range(4))
  expected = {
    'class': [0, 1, 2, 3],
    'number': [7308324466020115 + i for i in range(4)],
  }
  assert labels == expected.get(key, [-1] * 4)
  assert source.num_classes == (4 if key == 'class' else 0)
  assert source.label_problem == ''


@pytest.mark.parametrize('key', ['text', 'several', 'group'])
def test_evaluation_names_the_field(folder, key):
  config = config_lib.default()
  config_lib.add_dataset(
    config,
    'x',
    source='tfds',
    path='mlcd_test_features',
    data_dir=str(folder),
    label_key=key,
    test_split='train',
  )
  with pytest.raises(errors.UserError) as e:
    stage.open_sources(config)
  assert str(e.value).startswith(
    f'evaluate.datasets.x.label_key={key}: is {_PROBLEMS[key]} in the train '
    'split, and no class number'
  )


@pytest.mark.parametrize('key', ['images', 'pixels', 'text', 'class'])
def test_what_is_no_image_is_refused(folder, key):
  with pytest.raises(errors.UserError) as e:
    _opened(folder, image_key=key)
  assert str(e.value).startswith(
    f'data.image_key={key}: mlcd_test_features has'
  )


@pytest.mark.parametrize('key', ['class', 'scores', 'group', 'missing'])
def test_what_is_no_caption_is_none(folder, key):
  assert _opened(folder, caption_key=key)[0]['caption'] == ''


def test_text_is_a_caption(folder):
  source = _opened(folder, caption_key='text')
  captions = {source[i]['caption'] for i in range(4)}
  assert captions == {f'person {i}' for i in range(4)}


def _objects(folder, **keys):
  """The records in the order of their images."""
  source = _opened(folder, label_key='class', **keys)
  return sorted((source[i] for i in range(4)), key=lambda r: r['label'])


def test_boxes_are_in_pixels_and_in_the_order_of_their_labels(folder):
  found = _objects(
    folder, attributes_key='objects/label', boxes_key='objects/bbox'
  )
  for i, record in enumerate(found):
    assert record['boxes'].dtype == np.float32
    assert record['boxes'].shape == (i, 4)
    assert record['box_labels'].tolist() == [3, 1, 3][:i]
    assert record['attributes'].tolist() == [[], [3], [1, 3], [1, 3]][i]
  np.testing.assert_allclose(
    found[3]['boxes'],
    [[20, 8, 30, 16], [0, 0, 40, 32], [4, 16, 8, 32]],
    atol=1e-4,
  )


def test_boxes_are_there_only_where_the_keys_are(folder):
  (record, *_) = _objects(folder, attributes_key='objects/label')
  assert 'boxes' not in record and 'box_labels' not in record
  (record, *_) = _objects(folder, boxes_key='objects/bbox')
  assert 'boxes' in record and 'box_labels' not in record


@pytest.mark.parametrize('image', [b'', b'no image', shards.jpeg(0)[:20]])
def test_a_bad_image_has_no_boxes(folder, image):
  record = {
    'image': image,
    'objects': {'bbox': [[0, 0, 1, 1]], 'label': [2]},
  }
  source = dataclasses.replace(
    _opened(folder, attributes_key='objects/label', boxes_key='objects/bbox'),
    data=[record],
  )
  assert source[0]['boxes'].shape == (0, 4)
  assert source[0]['box_labels'].shape == (0,)
  assert source[0]['attributes'].tolist() == [2]


@pytest.mark.parametrize(
  ('keys', 'says'),
  [
    (dict(boxes_key='x'), r'data.boxes_key=x: .* has .*objects'),
    (dict(boxes_key='objects/box'), 'data.boxes_key=objects/box'),
    (dict(boxes_key='scores'), 'type Tensor there; name a feature with boxes'),
    (dict(boxes_key='objects/pixels'), 'as YXYX; only REL_YXYX'),
    (
      dict(boxes_key='objects/bbox', attributes_key='several'),
      'not those of the labels of data.attributes_key=several; .* objects/',
    ),
    (dict(attributes_key='x'), r'data.attributes_key=x: .* has .*objects'),
    (dict(attributes_key='number'), 'data.attributes_key=number: .* classes'),
  ],
)
def test_what_is_no_object_is_refused(folder, keys, says):
  with pytest.raises(errors.UserError, match=says):
    _opened(folder, **keys)
