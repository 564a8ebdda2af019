"""The order of data, on any number of hosts, workers and threads."""

import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax.cluster import labels
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.runtime import files
from tests.data import shards

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """60 images in tars."""
  folder = tmp_path_factory.mktemp('tars')
  for shard in range(3):
    shards.tar(
      folder / f'{shard}.tar',
      [
        (f'{i:04d}.jpg', shards.jpeg(i))
        for i in range(20 * shard, 20 * shard + 20)
      ],
    )
  config = config_lib.default()
  config.data.source = 'webdataset'
  config.data.path = str(folder)
  return sources.make(config.data)


def _train_batches(source, **options):
  rows = np.arange(len(source))
  return pipelines.train_batches(
    source,
    rows,
    np.tile(rows[:, None], (1, 4)).astype(np.int32),
    num_positives=2,
    batch_size=16,
    image_size=28,
    crop_area=(0.3, 1.0),
    flip=True,
    **dict(seed=5) | options,
  )


def _take(batches, count):
  return [next(batches) for _ in range(count)]


def _assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def _joined(slices, own):
  """Global batches of the hosts' rows, each in its place."""
  order = np.argsort(np.concatenate(own))
  return [
    {k: np.concatenate([p[k] for p in parts])[order] for k in parts[0]}
    for parts in zip(*slices)
  ]


def test_batch(source):
  label_rows = np.arange(len(source))
  label_rows[::10] = -1
  (batch,) = _take(
    pipelines.train_batches(
      source,
      label_rows,
      np.arange(len(source) * 4).reshape(-1, 4),
      num_positives=3,
      batch_size=60,
      image_size=14,
      crop_area=(0.5, 1.0),
      flip=True,
      seed=1,
    ),
    1,
  )
  assert batch['image'].shape == (60, 14, 14, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['labels'].shape == (60, 3)
  assert batch['labels'].dtype == np.int32
  assert batch['weight'].dtype == np.float32
  unlabelled = batch['labels'][:, 0] < 0
  assert unlabelled.sum() == 6
  np.testing.assert_array_equal(batch['weight'], 1 - unlabelled)
  assert not batch['image'][unlabelled].any()
  labelled = batch['labels'][~unlabelled]
  np.testing.assert_array_equal(labelled[:, 0] % 4, 0)
  np.testing.assert_array_equal(labelled[:, 1], labelled[:, 0] + 1)


def test_seed_changes_order_and_crops(source):
  (a,), (b,) = (_take(_train_batches(source, seed=s), 1) for s in (1, 2))
  assert not np.array_equal(a['labels'], b['labels'])
  rows = pipelines._TrainRows(
    source=source, label_rows=None, labels=None, num_positives=1,
    image_size=1, crop_area=(), flip=True, seed=3,
  )  # fmt: skip
  draws = rows.draw(range(100, 130))
  assert rows.draw(range(117, 118)) == [draws[17]]
  assert len({tuple(d) for d in draws}) == 30


def test_a_batch_of_many_chunks(source, monkeypatch):
  whole = _take(_train_batches(source), 3)
  monkeypatch.setattr(pipelines, '_CHUNK', 5)  # 5, 5, 5 and 1.
  _assert_same(_take(_train_batches(source), 3), whole)


def _own_rows(hosts, run):
  """Rows of a batch of 16 for each host, in runs that alternate."""
  rows = np.arange(16).reshape(-1, hosts, run)
  return rows.swapaxes(0, 1).reshape(hosts, -1)


@pytest.mark.parametrize(
  ('hosts', 'run'), [(2, 8), (4, 4), (8, 2), (2, 4), (2, 1), (4, 2), (8, 1)]
)
def test_global_batch_is_the_same_on_any_number_of_hosts(source, hosts, run):
  whole = _take(_train_batches(source), 9)  # Over two epochs.
  own = _own_rows(hosts, run)
  slices = [_take(_train_batches(source, rows=rows), 9) for rows in own]
  assert {len(b['image']) for b in slices[0]} == {16 // hosts}
  _assert_same(_joined(slices, own), whole)


@pytest.mark.parametrize(('hosts', 'run'), [(2, 8), (4, 4), (2, 2), (4, 1)])
def test_ordered_batches_on_any_number_of_hosts(source, hosts, run):
  options = dict(batch_size=16, image_size=28)
  whole = list(pipelines.ordered_batches(source, **options))
  own = _own_rows(hosts, run)
  slices = [
    list(pipelines.ordered_batches(source, rows=rows, **options))
    for rows in own
  ]
  _assert_same(_joined(slices, own), whole)
  weight = np.concatenate([b['weight'] for b in whole])
  np.testing.assert_array_equal(weight, np.arange(64) < 60)


def test_resume_needs_only_the_step(source):
  whole = _take(_train_batches(source), 9)
  _assert_same(_take(_train_batches(source, start_step=6), 3), whole[6:])


def test_every_epoch_has_every_image_once_in_another_order(source):
  order = np.concatenate(
    [b['labels'][:, 0] for b in _take(_train_batches(source), 15)]
  ).reshape(4, 60)
  np.testing.assert_array_equal(np.sort(order), [np.arange(60)] * 4)
  assert (order[0] != order[1]).any()


def test_threads_do_not_change_the_order(source, monkeypatch):
  whole = _take(_train_batches(source), 5)
  monkeypatch.setattr(pipelines, 'num_threads', lambda *_: 4)
  _assert_same(_take(_train_batches(source), 5), whole)


_WORKERS = """
import sys
import numpy as np
from absl import flags
from mlcd_jax import config as config_lib
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources


def main():
  flags.FLAGS(sys.argv[:1])
  config = config_lib.default()
  config.data.source = 'webdataset'
  config.data.path = sys.argv[1]
  source = sources.make(config.data)
  rows = np.arange(len(source))
  for workers in (0, 2):
    batches = pipelines.train_batches(
      source, rows, rows[:, None].astype(np.int32), num_positives=1,
      batch_size=8, image_size=28, crop_area=(0.3, 1.0), flip=True, seed=0,
      num_workers=workers)
    total = [next(batches) for _ in range(4)]
    print(sum(int(b['image'].sum()) for b in total),
          [b['labels'][:, 0].tolist() for b in total])


if __name__ == '__main__':
  main()
"""


def test_worker_processes_give_the_same_batches(source, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(_WORKERS)
  folder = source._tars[0].path.rpartition('/')[0]
  done = subprocess.run(
    [sys.executable, script, folder],
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  threads, workers = done.stdout.splitlines()
  assert threads == workers


def test_workers_map_labels_and_indices(source, tmp_path):
  rows = np.arange(400_000, dtype=np.int32).reshape(-1, 4)
  files.write_npy(tmp_path / 'labels_00000.npy', rows[:60_000])
  files.write_npy(tmp_path / 'labels_00001.npy', rows[60_000:])
  manifest = manifests.Manifest('cluster', tmp_path, config={}, inputs={})
  manifest.result = {'num_centers': 9, 'num_rows': len(rows), 'sha256': {}}
  opened = labels.Labels(manifest)
  pickled = pickle.dumps(opened)
  assert len(pickled) < 2_000
  copy = pickle.loads(pickled)
  np.testing.assert_array_equal(copy[99_999], rows[-1])

  pickled = pickle.dumps(source)
  assert len(pickled) < 2_000
  assert pickle.loads(pickled)[7] == source[7]


def test_shared_array_leaves_no_file_behind():
  array = files.SharedArray(np.arange(10))
  copy = pickle.loads(pickle.dumps(array))
  path = array._path
  assert path.exists()  # The copy maps it.
  assert not copy.array.flags.owndata and not copy.array.flags.writeable
  del array
  assert not path.exists()
  np.testing.assert_array_equal(copy[:], np.arange(10))


class TestPrefetched:
  """Batches are made ready while the devices compute."""

  def test_overlaps_and_counts_the_wait(self):
    def slow(count):
      for i in range(count):
        time.sleep(0.05)
        yield i

    batches = pipelines.Prefetched(slow(8), lambda batch: -batch)
    got = []
    for _ in range(6):
      got.append(next(batches))
      time.sleep(0.06)  # The step.
    assert got == [0, -1, -2, -3, -4, -5]
    assert 0.04 < batches.seconds_waited < 0.15  # The first one, not 0.3 s.
    batches.close()

  def test_errors_reach_the_loop(self):
    def broken():
      yield 1
      raise ValueError('no more')

    batches = pipelines.Prefetched(broken(), lambda batch: batch)
    assert next(batches) == 1
    with pytest.raises(ValueError, match='no more'):
      next(batches)
    batches.close()


_MEMORY = """
import os
import sys
import numpy as np
from mlcd_jax.data import pipelines
import cv2


class Source:
  num_classes = 0
  images = [cv2.imencode('.png', np.random.default_rng(i).integers(
      0, 255, (32, 32, 3), np.uint8))[1].tobytes() for i in range(64)]

  def __len__(self):
    return 10_000

  def __getitem__(self, i):
    return {'key': str(i), 'image': self.images[i % 64], 'label': -1,
            'caption': ''}

  def keys(self):
    return np.arange(len(self)).astype('S')


def resident():
  with open('/proc/self/statm') as f:
    return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


rows = np.arange(10_000)
batches = pipelines.Prefetched(
  pipelines.train_batches(
    Source(), rows, rows[:, None].astype(np.int32), num_positives=1,
    batch_size=16, image_size=32, crop_area=(0.5, 1.0), flip=True, seed=0),
  lambda batch: batch)
sizes = {}
for step in range(1, int(sys.argv[1]) + 1):
  next(batches)
  if step in (200, int(sys.argv[1])):
    print(resident())
batches.close()
"""


def test_memory_does_not_grow():
  done = subprocess.run(
    [sys.executable, '-c', _MEMORY, '2000'],
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  early, late = map(int, done.stdout.split())
  assert late < 1.05 * early


def test_ordered_batches_cover_the_source_once():
  source = sources.make(config_lib.default().data, 'train[:50]')
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
