"""Input pipelines: the order of the data is a function of the step alone.

Records are shuffled and augmented first and divided among hosts last, so that
a global batch is the same for any number of hosts, workers and threads, and a
run continues at step t by building the pipeline at t.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import dataclasses
import os
import time
from typing import Any
from typing import Protocol

import grain
import jax
import numpy as np

from mlcd_jax import files
from mlcd_jax.data import problems
from mlcd_jax.data import sources
from mlcd_jax.data import transforms

# Images seen before the share of bad ones can stop a run.
_MIN_SEEN = 1_000


class LabelRows(Protocol):
  """Labels by row, as `labels.Labels` keeps them."""

  def __getitem__(self, row: int) -> np.ndarray: ...


def train_batches(
  source: sources.Source,
  label_rows: np.ndarray,
  labels: LabelRows,
  *,
  num_positives: int,
  batch_size: int,
  image_size: int,
  crop_area: tuple[float, float],
  flip: bool,
  seed: int,
  start_step: int = 0,
  num_workers: int = 0,
  max_bad_fraction: float = 1.0,
  host: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of the global batches from `start_step` on.

  Args:
    source: images.
    label_rows: int [len(source)], each record's row in `labels`, or -1.
    labels: int32 [num_labels] by row, nearest first.
    num_positives: how many of them are used.
    batch_size: images over all hosts.
    image_size: pixels of a side.
    crop_area: share of the image a crop keeps, (low, high).
    flip: mirror half of the crops.
    seed: of order and augmentation.
    start_step: index of the first global batch.
    num_workers: decoding processes; 0 decodes in threads.
    max_bad_fraction: more bad images than this stop the run.
    host: (index, count) of this process; jax's where not given.

  Yields:
    image uint8 [b, S, S, 3], labels int32 [b, P] (-1 where there is none),
    weight float32 [b]: 0 where the image is bad or has no labels.

  Raises:
    UserError: too many images are bad.
  """
  example = _TrainExample(labels, num_positives, image_size, crop_area, flip)
  dataset = (
    grain.MapDataset.source(_Labelled(source, files.SharedArray(label_rows)))
    .seed(seed)
    .shuffle()
    .repeat(None)
    .random_map(example)
  )
  dataset = _host_batches(dataset, batch_size, host)
  batches = _iterate(dataset[start_step:], num_workers, image_size)
  return _reported(batches, source, 'train', max_bad_fraction)


def ordered_batches(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: int,
  num_workers: int = 0,
  host: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every record once, in order, resized and center-cropped.

  The last batch is padded, so that shapes stay the same; weight marks padding
  and bad images with 0.

  Args:
    source: images.
    batch_size: images over all hosts.
    image_size: pixels of a side.
    num_workers: decoding processes; 0 decodes in threads.
    host: (index, count) of this process; jax's where not given.

  Yields:
    image uint8 [b, S, S, 3], label int32 [b], weight float32 [b].
  """
  padded = -(-len(source) // batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(
    _OrderedExample(source, image_size)
  )
  dataset = _host_batches(dataset, batch_size, host)
  batches = _iterate(dataset, num_workers, image_size)
  return _reported(batches, source, 'data', max_bad_fraction=1.0)


class Prefetched:
  """Batches put on the devices ahead of time, in a thread.

  Attributes:
    seconds_waited: how long `next` had to wait, all together.
  """

  def __init__(
    self,
    batches: Iterator[dict[str, np.ndarray]],
    put: Callable[[dict[str, np.ndarray]], Any],
    *,
    depth: int = 2,
  ):
    """Begins at once to read `depth` batches ahead and `put` each."""
    self.seconds_waited = 0.0
    self._batches = batches
    self._put = put
    self._pool = futures.ThreadPoolExecutor(1, 'prefetch')
    self._ready = collections.deque(
      self._pool.submit(self._read) for _ in range(depth)
    )

  def __iter__(self):
    return self

  def __next__(self) -> Any:
    start = time.monotonic()
    batch = self._ready.popleft().result()
    self.seconds_waited += time.monotonic() - start
    self._ready.append(self._pool.submit(self._read))
    return batch

  def close(self) -> None:
    """Stops reading."""
    self._pool.shutdown(cancel_futures=True)

  def _read(self) -> Any:
    return self._put(next(self._batches))


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """Adds to each record its place and its row among the labels."""

  source: sources.Source
  label_rows: files.SharedArray

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[index] | {
      'record': index,
      'label_row': int(self.label_rows[index]),
    }


@dataclasses.dataclass(frozen=True)
class _TrainExample:
  """record, rng -> one row of a training batch."""

  labels: LabelRows
  num_positives: int
  image_size: int
  crop_area: tuple[float, float]
  flip: bool

  def __call__(self, record, rng):
    row = record['label_row']
    labels = np.full(self.num_positives, -1, np.int32)
    image, bad = None, 0
    if row >= 0:
      try:
        image = transforms.random_resized_crop(
          record['image'],
          self.image_size,
          rng,
          area=self.crop_area,
          flip=self.flip,
        )
        labels = np.asarray(self.labels[row][: self.num_positives], np.int32)
      except transforms.BadImage as e:
        bad = transforms.REASONS.index(str(e)) + 1
    return {'labels': labels} | _row(
      image, bad, record['record'], self.image_size
    )


@dataclasses.dataclass(frozen=True)
class _OrderedExample:
  """index -> one row of an evaluation batch; padding past the end."""

  source: sources.Source
  image_size: int

  def __call__(self, index):
    label, image, bad = -1, None, 0
    if index < len(self.source):
      record = self.source[index]
      label = record['label']
      try:
        image = transforms.resize_center_crop(
          transforms.decode(record['image']), self.image_size
        )
      except transforms.BadImage as e:
        bad = transforms.REASONS.index(str(e)) + 1
    return {'label': np.int32(label)} | _row(image, bad, index, self.image_size)


def _row(
  image: np.ndarray | None, bad: int, record: int, size: int
) -> dict[str, Any]:
  """The parts of a row that all batches have; zeros where there is no image."""
  return {
    'image': np.zeros((size, size, 3), np.uint8) if image is None else image,
    'weight': np.float32(image is not None),
    'bad': np.int8(bad),  # 1 + the place in transforms.REASONS.
    'record': np.int64(record),
  }


class _HostRows(grain.MapDataset):
  """This host's contiguous share of every global batch of rows."""

  def __init__(self, parent, *, batch_size, host, num_hosts):
    super().__init__(parent)
    self._batch = batch_size
    self._host_batch = batch_size // num_hosts
    self._first = host * self._host_batch

  def __len__(self) -> int:
    return len(self._parent) // self._batch * self._host_batch

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    step, row = divmod(index, self._host_batch)
    return self._parent[step * self._batch + self._first + row]


def _host_batches(
  dataset: grain.MapDataset, batch_size: int, host: tuple[int, int] | None
) -> grain.MapDataset:
  """Batches this host's rows of every global batch."""
  index, count = host or (jax.process_index(), jax.process_count())
  if batch_size % count:
    raise ValueError(f'batch {batch_size} is not divisible by {count} hosts')
  rows = _HostRows(dataset, batch_size=batch_size, host=index, num_hosts=count)
  return rows.batch(batch_size // count, drop_remainder=True)


def _num_threads(image_size: int) -> int:
  return max(1, (os.cpu_count() or 1) // 2)


def _iterate(
  dataset: grain.MapDataset, num_workers: int, image_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Reads ahead in threads, or in worker processes."""
  threads = _num_threads(image_size)
  batches = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  )
  if num_workers:
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  return iter(batches)


def _reported(
  batches: Iterator[dict[str, np.ndarray]],
  source: sources.Source,
  stage: str,
  max_bad_fraction: float,
) -> Iterator[dict[str, np.ndarray]]:
  """Takes 'bad' and 'record' out of the batches and reports them."""
  found = problems.Problems(stage)
  seen = 0
  for batch in batches:
    bad, record = batch.pop('bad'), batch.pop('record')
    seen += len(bad)
    for row in np.flatnonzero(bad):
      key = source.keys()[record[row]].decode('utf-8', 'replace')
      found.add(key, transforms.REASONS[bad[row] - 1])
    if seen >= _MIN_SEEN:
      found.check(seen, max_bad_fraction)
    yield batch
