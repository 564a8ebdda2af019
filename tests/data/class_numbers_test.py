"""Class numbers that are identifiers become 0, 1, 2 in all splits alike."""

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.evaluate import stage
from tests.data import shards

_SPARSE = {
  'of 64 bits': ([7308324466020115, 7308324466020116, 5], [1, 2, 0]),
  'taxa': ([48_101_997, 12, 7_000], [2, 0, 1]),
  'beyond 32 bits': ([2**32, 2**32 + 1, 2**31], [1, 2, 0]),
  'unlabelled too': ([10**9, -1, 0], [1, -1, 0]),
}
_DENSE = {
  'from 0 on': [0, 1, 2],
  'one missing': [0, 999, 2],
  'none': [-1, -1, -1],
}


def _write(source, folder, ids, count):
  """Images in turn of each class."""
  labels = [ids[i % len(ids)] for i in range(count)]
  folder.mkdir(parents=True)
  images = [shards.jpeg(i) for i in range(count)]
  if source == 'webdataset':
    members = [
      member
      for i, (image, label) in enumerate(zip(images, labels))
      for member in ((f'{i:03d}.jpg', image), (f'{i:03d}.cls', b'%d' % label))
    ]
    shards.tar(folder / '0.tar', members)
  elif source == 'parquet':
    table = shards.pa.table({'image': images, 'label': labels})
    shards.pq.write_table(table, folder / '0.parquet')
  else:
    shards.array_record(folder / '0.array_record', images=images, labels=labels)


def _opened(source, folder, splits=('train', 'test')):
  """Returns what evaluation gets."""
  config = config_lib.default()
  config_lib.add_dataset(
    config,
    'x',
    source=source,
    path=f'{folder}/{{split}}',
    cache_dir=f'{folder}/cache',
    **{f'{split}_split': split for split in splits},
  )
  return stage.open_sources(config)['x']


def _labels(source):
  return [source[i]['label'] for i in range(len(source))]


@pytest.mark.parametrize('source', ['webdataset', 'parquet', 'array_record'])
@pytest.mark.parametrize('name', _SPARSE)
def test_identifiers_are_numbered_anew(tmp_path, source, name):
  ids, numbers = _SPARSE[name]
  _write(source, tmp_path / 'train', ids, 6)
  _write(source, tmp_path / 'test', ids[::-1], 3)
  opened = _opened(source, tmp_path)
  assert _labels(opened['train']) == numbers * 2
  assert _labels(opened['test']) == numbers[::-1]
  for split in opened.values():
    assert split.num_classes == max(numbers) + 1
    assert split.labels().tolist() == _labels(split)


@pytest.mark.parametrize('source', ['webdataset', 'parquet', 'array_record'])
@pytest.mark.parametrize('name', ['from 0 on', 'one missing'])
def test_numbers_from_0_on_stay(tmp_path, source, name):
  ids = _DENSE[name]
  _write(source, tmp_path / 'train', ids, 6)
  _write(source, tmp_path / 'test', ids, 3)
  opened = _opened(source, tmp_path)
  assert _labels(opened['train']) == ids * 2
  assert _labels(opened['test']) == ids
  assert opened['train'].num_classes == max(ids) + 1


def test_a_class_of_the_test_split_alone_has_a_number_of_its_own(tmp_path):
  _write('parquet', tmp_path / 'train', [10**9, 10**10], 4)
  _write('parquet', tmp_path / 'test', [10**10, 10**11, 10**9], 3)
  opened = _opened('parquet', tmp_path)
  assert _labels(opened['train']) == [0, 1, 0, 1]
  assert _labels(opened['test']) == [1, 2, 0]
  assert opened['train'].num_classes == opened['test'].num_classes == 3


class _Labelled:
  """Records with these labels."""

  def __init__(self, labels, class_names=()):
    self._labels = np.asarray(labels)
    self.num_classes = int(self._labels.max()) + 1
    self.class_names = class_names

  def labels(self):
    return self._labels


@pytest.mark.parametrize(
  ('source', 'keep'),
  [
    (_Labelled(range(20_000)), False),  # All are used.
    (_Labelled([0, 20_000]), True),
    (_Labelled([0, 2], class_names=['a', 'b', 'c']), False),
    (_Labelled([0, 20_000], class_names=['a'] * 20_001), False),
  ],
)
def test_many_classes_with_names_or_without_gaps_stay(source, keep):
  opened = sources.number_classes(
    {'train': source}, field='x', label_key='label', keep=keep
  )
  assert opened == {'train': source}
