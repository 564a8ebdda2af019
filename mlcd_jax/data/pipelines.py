"""Input pipelines whose batches depend only on the seed and the step.

The epochs form one endless sequence of places. The record at a place and its
augmentation depend only on the place and the seed. Step t reads the batch_size
places from t * batch_size on. So a global batch is the same for any number of
hosts, workers and threads, and a run can continue at any step.
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

# Images that a thread or process makes at once. That is enough work to pay for
# handing it out, and takes little memory even if a batch has thousands.
_CHUNK = 128
_LARGE = 64  # From this side length in pixels, decoding dominates the time.
_ENDLESS = 2**40  # Steps; more than any run takes.
_PHILOX_BLOCK = 4  # Random numbers from one value of Philox's counter.
# Fewer images than this do not stop a run, however many of them are bad.
_MIN_SEEN = 1_000


class LabelRows(Protocol):
  """Labels int32 [num_labels] by row, such as `cluster.labels.Labels`."""

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
    source: the source of the images.
    label_rows: int [len(source)], each record's row in `labels`, or -1.
    labels: the labels of each row, nearest center first.
    num_positives: the number P of labels to use.
    batch_size: the number of images over all hosts.
    image_size: the side length S of the crops in pixels.
    crop_area: the (low, high) share of the image's area that a crop keeps.
    flip: True to mirror half of the crops.
    seed: the seed of order and augmentation.
    start_step: the index of the first global batch.
    num_workers: the number of decoding processes; 0 decodes in threads.
    max_bad_fraction: the share of bad images above which the run stops.
    rows: the ascending rows of a global batch that this host makes, from
      `sharding.own_rows`; None stands for all.

  Yields:
    image uint8 [b, S, S, 3]; labels int32 [b, P], -1 if missing; weight float32
    [b], 0 if the image is bad or has no labels.

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

  The last batch is padded to full size, so that all shapes are equal.

  Args:
    source: the source of the images.
    batch_size: the number of images over all hosts.
    image_size: the side length S of the results in pixels.
    prepare: makes uint8 [S, S, 3] of an image uint8 [H, W, 3]; None stands for
      `transforms.resize_center_crop`.
    num_workers: the number of decoding processes; 0 decodes in threads.
    rows: see `train_batches`.

  Yields:
    image uint8 [b, S, S, 3]; label int64 [b], -1 if there is none; weight
    float32 [b], 0 for padding and bad images.
  """
  if prepare is None:
    prepare = functools.partial(transforms.resize_center_crop, size=image_size)
  make = _OrderedRows(source, image_size, prepare)
  steps = range(-(-len(source) // batch_size))  # Rounded up.
  batches = _batches(make, steps, batch_size, rows, num_workers)
  return _reported(batches, source, 'data', max_bad_fraction=1.0)


def record_at(place: int, num_records: int, seed: int) -> int:
  """Returns the index of the record at a place in the sequence of epochs.

  Each epoch is a permutation of all records, computed without storing it.
  """
  epoch, index = divmod(place, num_records)
  return grain.experimental.index_shuffle(
    index,
    max_index=num_records - 1,
    seed=_epoch_seed(seed, epoch),
    rounds=4,  # The fewest that grain allows.
  )


class Prefetched:
  """An iterator that puts batches on the devices ahead of time, in a thread.

  Attributes:
    seconds_waited: the total time that `next` has waited for batches.
  """

  def __init__(
    self,
    batches: Iterator[dict[str, np.ndarray]],
    put: Callable[[dict[str, np.ndarray]], Any],
    *,
    depth: int = 2,
  ):
    """Starts to read up to `depth` batches ahead and calls `put` on each."""
    self.seconds_waited = 0.0
    self._batches = batches
    self._put = put
    self._pool = futures.ThreadPoolExecutor(1, 'prefetch')  # Keeps the order.
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
    """Stops reading; a batch in progress is finished first."""
    self._pool.shutdown(cancel_futures=True)

  def _read(self) -> Any:
    return self._put(next(self._batches))


class _Rows(Protocol):
  """A function that makes the rows of batches, one at a time."""

  image_size: int

  def draw(self, places: range) -> Sequence[Any]:
    """Returns the random numbers of each place."""
    ...

  def __call__(
    self, place: int, draws: Any, image: np.ndarray
  ) -> dict[str, Any]:
    """Fills the zero array `image` and returns the other values of the row."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainRows:
  """The rows of shuffled and augmented records; see `train_batches`."""

  source: sources.Source
  label_rows: files.SharedArray
  labels: LabelRows
  num_positives: int
  image_size: int
  crop_area: tuple[float, float]
  flip: bool
  seed: int

  def draw(self, places: range) -> list[list[float]]:
    """See `_Rows`; each place has its own values of Philox's counter."""
    blocks = -(-transforms.NUM_DRAWS // _PHILOX_BLOCK)
    generator = np.random.Generator(
      np.random.Philox(key=self.seed, counter=blocks * places.start)
    )
    return generator.random((len(places), blocks * _PHILOX_BLOCK)).tolist()

  def __call__(
    self, place: int, draws: Sequence[float], image: np.ndarray
  ) -> dict[str, Any]:
    """Crops one image; sets 'bad' and weight 0 if it cannot be used."""
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
  """The rows of all records in order, then of padding."""

  source: sources.Source
  image_size: int
  prepare: Callable[[np.ndarray], np.ndarray]

  def draw(self, places: range) -> Sequence[None]:
    """See `_Rows`; nothing is random here."""
    return [None] * len(places)

  def __call__(
    self, place: int, draws: None, image: np.ndarray
  ) -> dict[str, Any]:
    """Prepares one image; padding and bad images have weight 0."""
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


@functools.lru_cache(16)  # Every row asks, and few epochs are read at once.
def _epoch_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


_TYPES = {
  'labels': np.int32,
  'label': np.int64,  # Class numbers can be identifiers above 2**31.
  'weight': np.float32,
  'bad': np.int8,  # 1 + the index in transforms.REASONS, or 0.
  'record': np.int64,
}


@dataclasses.dataclass(frozen=True)
class _Chunks:
  """This host's rows of the global batches, in numbered chunks."""

  make: _Rows
  batch_size: int
  own: Sequence[range]  # This host's rows of a batch, from `_runs`.

  @property
  def per_step(self) -> int:
    """Returns the number of chunks of a batch."""
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
  """Yields this host's rows of the batches of `steps`, made ahead of time."""
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
  """Splits ascending rows into ranges of at most _CHUNK rows without gaps."""
  gaps = np.flatnonzero(np.diff(rows) != 1) + 1
  return [
    range(start, min(start + _CHUNK, run[-1] + 1))
    for run in map(np.ndarray.tolist, np.split(rows, gaps))
    for start in range(run[0], run[-1] + 1, _CHUNK)
  ]


def num_threads(image_size: int, num_workers: int = 0) -> int:
  """Returns the number of threads of each process that decode images.

  Decoding releases Python's lock, but about 45 us of work per row does not. At
  1,300 images a second per thread, more than 16 threads would wait for each
  other. For digits of 28 pixels even two threads do: the rate was 9,700 images
  per CPU-second with one thread, 7,900 with two and 7,400 with four.
  """
  if image_size < _LARGE:
    return 1
  # Slurm may give the process fewer cores than the machine has.
  if hasattr(os, 'sched_getaffinity'):
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
  """Yields batches without 'bad' and 'record', which it counts and checks."""
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
