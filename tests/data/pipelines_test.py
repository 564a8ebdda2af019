"""The order of the data is a function of the step alone."""

import itertools

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.data import transforms


@pytest.fixture(scope='module', name='source')
def fixture_source():
  return sources.make(config_lib.default().data, 'train[:50]')


def take(source, count, **changes):
  options = dict(
    num_positives=3,
    batch_size=16,
    image_size=14,
    crop_area=(0.5, 1.0),
    flip=True,
    seed=1,
  )
  label_rows = np.arange(len(source))
  label_rows[5] = -1
  labels = np.arange(len(source) * 4).reshape(-1, 4)
  batches = pipelines.train_batches(
    source, label_rows, labels, **(options | changes)
  )
  return list(itertools.islice(batches, count))


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def test_batch(source):
  (batch,) = take(source, 1)
  assert batch['image'].shape == (16, 14, 14, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['labels'].shape == (16, 3)
  assert batch['labels'].dtype == np.int32
  np.testing.assert_array_equal(batch['weight'], batch['labels'][:, 0] >= 0)
  labelled = batch['labels'][batch['weight'] > 0]
  np.testing.assert_array_equal(labelled[:, 0] % 4, 0)
  np.testing.assert_array_equal(labelled[:, 1], labelled[:, 0] + 1)


def test_starts_at_any_step(source):
  assert_same(take(source, 9)[6:], take(source, 3, start_step=6))


def test_seed_changes_order_and_crops(source):
  (a,), (b,) = take(source, 1), take(source, 1, seed=2)
  assert not np.array_equal(a['image'], b['image'])


def test_every_record_once_an_epoch_in_a_new_order(source):
  labels = np.concatenate([b['labels'][:, 0] for b in take(source, 25)])
  first, second = labels[:50], labels[50:100]
  np.testing.assert_array_equal(np.sort(first), np.sort(second))
  assert len(np.unique(first)) == 50
  assert not np.array_equal(first, second)


@pytest.mark.parametrize('hosts', [2, 4, 8])
def test_global_batch_is_the_same_for_any_number_of_hosts(
  source, hosts, monkeypatch
):
  whole = take(source, 3)
  parts = []
  monkeypatch.setattr(pipelines.jax, 'process_count', lambda: hosts)
  for host in range(hosts):
    monkeypatch.setattr(pipelines.jax, 'process_index', lambda h=host: h)
    parts.append(take(source, 3))
  joined = [
    {k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]}
    for i in range(3)
  ]
  assert_same(joined, whole)


def test_ordered_batches_cover_the_source_once(source):
  batches = list(
    pipelines.ordered_batches(source, batch_size=16, image_size=28)
  )
  assert len(batches) == 4
  weight = np.concatenate([b['weight'] for b in batches])
  assert weight.sum() == 50 and (weight[:50] == 1).all()
  labels = np.concatenate([b['label'] for b in batches])[:50]
  np.testing.assert_array_equal(labels, [source[i]['label'] for i in range(50)])
  np.testing.assert_array_equal(
    batches[0]['image'][3], transforms.decode(source[3]['image'])
  )


def test_bad_image_weighs_nothing(source):
  class Broken:
    def __len__(self):
      return len(source)

    def __getitem__(self, index):
      record = source[index]
      return record | {'image': b'<html>'} if record['label'] == 3 else record

  labels = [source[i]['label'] for i in range(50)]
  batches = list(
    pipelines.ordered_batches(Broken(), batch_size=50, image_size=28)
  )
  np.testing.assert_array_equal(batches[0]['weight'], np.array(labels) != 3)
  assert not batches[0]['image'][np.array(labels) == 3].any()
