"""Input pipelines: the order of the data is a function of the step alone.

Place p of the endless stream of epochs holds the same record, augmented the
same, whoever reads it; step t is places t * batch_size and following. So a
global batch is the same for any number of hosts, workers and threads, and a
run continues at step t by beginning to read there.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import os
import time
from typing import Any
from typing import Protocol

import grain
import numpy as np

from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.runtime import files
from mlcd_jax.runtime import problems

# Images that a thread or process makes at once: work enough to be handed out,
# little enough that memory stays small where a batch has thousands.
_CHUNK = 128
_LARGE = 64  # Pixels of a side from which decoding takes most of the time.
_ENDLESS = 2**40  # Steps.
_PHILOX_BLOCK = 4  # Random numbers that one step of Philox's counter makes.
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
  rows: np.ndarray | None = None,
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
    rows: which of a global batch's are this host's, ascending, as
      sharding.own_rows says; all where not given.

  Yields:
    image uint8 [b, S, S, 3], labels int32 [b, P] (-1 where there is none),
    weight float32 [b]: 0 where the image is bad or has no labels.

  Raises:
    UserError: too many images are bad.
  """
  make = _TrainRows(
    source=source,
    label_rows=files.SharedArray(label_rows),
    labels=labels,
    num_positives=num_positives,
    image_size=image_size,
    crop_area=crop_area,
    flip=flip,
    seed=seed,
  )
  steps = range(start_step, _ENDLESS)
  batches = _batches(make, steps, batch_size, rows, num_workers)
  return _reported(batches, source, 'train', max_bad_fraction)


def ordered_batches(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: int,
  prepare: Callable[[np.ndarray], np.ndarray] | None = None,
  num_workers: int = 0,
  rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every record once, in order, resized and center-cropped.

  The last batch is padded, so that shapes stay the same; weight marks padding
  and bad images with 0.

  Args:
    source: images.
    batch_size: images over all hosts.
    image_size: pixels of a side.
    prepare: pixels to an image of that size; shorter side and center where
      not given.
    num_workers: decoding processes; 0 decodes in threads.
    rows: see `train_batches`.

  Yields:
    image uint8 [b, S, S, 3], label int64 [b], weight float32 [b].
  """
  if prepare is None:
    prepare = functools.partial(transforms.resize_center_crop, size=image_size)
  make = _OrderedRows(source, image_size, prepare)
  steps = range(-(-len(source) // batch_size))
  batches = _batches(make, steps, batch_size, rows, num_workers)
  return _reported(batches, source, 'data', max_bad_fraction=1.0)


def record_at(place: int, num_records: int, seed: int) -> int:
  """Returns which record is at a place of the endless stream of epochs."""
  epoch, index = divmod(place, num_records)
  return grain.experimental.index_shuffle(
    index,
    max_index=num_records - 1,
    seed=_epoch_seed(seed, epoch),
    rounds=4,
  )


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


class _Rows(Protocol):
  """What a batch's rows are made of."""

  image_size: int

  def draw(self, places: range) -> Sequence[Any]:
    """Returns what is random about each of some places."""
    ...

  def __call__(
    self, place: int, draws: Any, image: np.ndarray
  ) -> dict[str, Any]:
    """Fills in the zeros of `image`, returns the other values of the row."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainRows:
  """Shuffled, augmented records; place counts on through the epochs."""

  source: sources.Source
  label_rows: files.SharedArray
  labels: LabelRows
  num_positives: int
  image_size: int
  crop_area: tuple[float, float]
  flip: bool
  seed: int

  def draw(self, places: range) -> list[list[float]]:
    """See `_Rows`; every place has Philox's blocks to itself."""
    blocks = -(-transforms.NUM_DRAWS // _PHILOX_BLOCK)
    generator = np.random.Generator(
      np.random.Philox(key=self.seed, counter=blocks * places.start)
    )
    return generator.random((len(places), blocks * _PHILOX_BLOCK)).tolist()

  def __call__(
    self, place: int, draws: Sequence[float], image: np.ndarray
  ) -> dict[str, Any]:
    """See `_Rows`."""
    record = record_at(place, len(self.source), self.seed)
    row = int(self.label_rows[record])
    labels = np.full(self.num_positives, -1, np.int32)
    bad = 0
    if row >= 0:
      try:
        transforms.random_resized_crop(
          self.source[record]['image'],
          self.image_size,
          draws,
          area=self.crop_area,
          flip=self.flip,
          out=image,
        )
        labels = self.labels[row][: self.num_positives]
      except transforms.BadImage as e:
        bad = transforms.REASONS.index(str(e)) + 1
    good = labels[0] >= 0 and not bad
    return {'labels': labels, 'weight': good, 'bad': bad, 'record': record}


@dataclasses.dataclass(frozen=True)
class _OrderedRows:
  """Every record once, then padding."""

  source: sources.Source
  image_size: int
  prepare: Callable[[np.ndarray], np.ndarray]

  def draw(self, places: range) -> Sequence[None]:
    """See `_Rows`."""
    return [None] * len(places)

  def __call__(
    self, place: int, draws: None, image: np.ndarray
  ) -> dict[str, Any]:
    """See `_Rows`."""
    row = {'label': -1, 'weight': False, 'bad': 0, 'record': place}
    if place >= len(self.source):
      return row
    record = self.source[place]
    row['label'] = record['label']
    try:
      pixels = transforms.decode(record['image'])
      image[:] = self.prepare(pixels)
      row['weight'] = True
    except transforms.BadImage as e:
      row['bad'] = transforms.REASONS.index(str(e)) + 1
    return row


@functools.lru_cache(16)
def _epoch_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


_TYPES = {
  'labels': np.int32,
  'label': np.int64,  # An identifier, in some data sets.
  'weight': np.float32,
  'bad': np.int8,  # 1 + the place in transforms.REASONS, or 0.
  'record': np.int64,
}


@dataclasses.dataclass(frozen=True)
class _Chunks:
  """Parts of this host's share of the global batches, by number."""

  make: _Rows
  batch_size: int
  own: Sequence[range]  # Of a batch's rows, in runs of at most _CHUNK.

  @property
  def per_step(self) -> int:
    """How many of them are a batch."""
    return len(self.own)

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    step, part = divmod(number, self.per_step)
    first, own = step * self.batch_size, self.own[part]
    side = self.make.image_size
    images = np.zeros((len(own), side, side, 3), np.uint8)
    places = range(first + own.start, first + own.stop)
    rows = list(map(self.make, places, self.make.draw(places), images))
    return {'image': images} | {
      name: np.array([row[name] for row in rows], _TYPES[name])
      for name in rows[0]
    }


def _batches(
  make: _Rows,
  steps: range,
  batch_size: int,
  rows: np.ndarray | None,
  num_workers: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Makes this host's rows of some steps ahead of time."""
  own = _runs(np.arange(batch_size) if rows is None else rows)
  chunks = _Chunks(make, batch_size, own)
  per_step = chunks.per_step
  threads = num_threads(make.image_size, num_workers)
  ready = (
    grain.MapDataset.range(steps.start * per_step, steps.stop * per_step)
    .map(chunks)
    .to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
  )
  if num_workers:
    ready = ready.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  ready = iter(ready)
  for _ in steps:
    parts = [next(ready) for _ in range(per_step)]
    if per_step == 1:
      yield parts[0]
    else:
      yield {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _runs(rows: np.ndarray) -> list[range]:
  """Cuts ascending rows into runs that follow each other, of _CHUNK at most."""
  gaps = np.flatnonzero(np.diff(rows) != 1) + 1
  return [
    range(start, min(start + _CHUNK, run[-1] + 1))
    for run in map(np.ndarray.tolist, np.split(rows, gaps))
    for start in range(run[0], run[-1] + 1, _CHUNK)
  ]


def num_threads(image_size: int, num_workers: int = 0) -> int:
  """Threads of each process that decode images.

  Decoding lets go of Python's lock, the 45 us a row around it do not: above
  16 threads of 1,300 images a second they wait for each other, and at digits
  of 28 pixels two already do (9,700 images a CPU-second with one thread, 7,900
  with two, 7,400 with four).
  """
  if image_size < _LARGE:
    return 1
  if hasattr(os, 'sched_getaffinity'):  # Under Slurm fewer than there are.
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return min(16, max(1, cores // max(1, num_workers)))


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
