"""Features that are no class, no image and no caption."""

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
}


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
