"""The embedded data is what its docstring says."""

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.runtime import errors


@pytest.fixture(scope='module', name='train')
def fixture_train():
  return sources.make(config_lib.default().data, 'train')


def test_split_is_fixed_and_complete(train):
  others = [sources.make(config_lib.default().data, split)
            for split in ('validation', 'test')]  # fmt: skip
  assert [len(s) for s in (train, *others)] == [3_000, 500, 1_500]
  assert all(s.num_classes == 10 for s in (train, *others))
  labels = [source[i]['label'] for source in (train, *others)
            for i in range(len(source))]  # fmt: skip
  np.testing.assert_array_equal(np.bincount(labels), np.full(10, 500))


def test_record(train):
  record = train[7]
  pixels = transforms.decode(record['image'])
  assert pixels.shape == (28, 28, 3)
  assert pixels.dtype == np.uint8
  assert (pixels == pixels[..., :1]).all()  # Grey is repeated.
  assert pixels.max() > 200 and np.median(pixels) == 0
  assert record['key'].encode() == train.keys()[7]
  words = 'zero one two three four five six seven eight nine'.split()
  assert (
    words[record['label']] in record['caption']
    or str(record['label']) in record['caption']
  )


def test_captions_use_every_template(train):
  captions = {train[i]['caption'] for i in range(500)}
  assert len(captions) == 50


def test_keys_are_unique(train):
  assert len(set(train.keys().tolist())) == 3_000


def test_unknown_split_is_refused():
  with pytest.raises(
    errors.UserError, match='data.split=dev.*test, train, validation'
  ):
    sources.make(config_lib.default().data, 'dev')


def test_empty_split_is_refused():
  with pytest.raises(errors.UserError, match='no images'):
    sources.make(config_lib.default().data, 'train[:0]')


def test_unknown_tfds_name_is_refused():
  data = config_lib.default().data
  data.source, data.path = 'tfds', 'no_such_data_set'
  with pytest.raises(errors.UserError, match='data.path=no_such_data_set'):
    sources.make(data)


def test_unprepared_tfds_data_is_refused(tmp_path):
  data = config_lib.default().data
  data.source, data.path, data.data_dir = 'tfds', 'cifar10', str(tmp_path)
  with pytest.raises(errors.UserError, match='tfds build cifar10'):
    sources.make(data)
