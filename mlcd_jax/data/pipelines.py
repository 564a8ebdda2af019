"""Input pipelines: the order of the data is a function of the step alone.

Records are shuffled and augmented first and divided among hosts last, so that
a global batch is the same for any number of hosts, workers and threads, and a
run continues at step t by building the pipeline at t.
"""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any
from typing import Protocol

import grain
import jax
import numpy as np

from mlcd_jax.data import sources
from mlcd_jax.data import transforms


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

  Yields:
    image uint8 [b, S, S, 3], labels int32 [b, P] (-1 where there is none),
    weight float32 [b]: 0 where the image is bad or has no labels.
  """
  example = _TrainExample(labels, num_positives, image_size, crop_area, flip)
  dataset = (
    grain.MapDataset.source(_Labelled(source, label_rows))
    .seed(seed)
    .shuffle()
    .repeat(None)
    .random_map(example)
  )
  dataset = _host_batches(dataset, batch_size)
  return _iterate(dataset[start_step:], num_workers)


def ordered_batches(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: int,
  num_workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every record once, in order, resized and center-cropped.

  The last batch is padded, so that shapes stay the same; weight marks padding
  and bad images with 0.

  Args:
    source: images.
    batch_size: images over all hosts.
    image_size: pixels of a side.
    num_workers: decoding processes; 0 decodes in threads.

  Yields:
    image uint8 [b, S, S, 3], label int32 [b], weight float32 [b].
  """
  padded = -(-len(source) // batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(
    _OrderedExample(source, image_size)
  )
  return _iterate(_host_batches(dataset, batch_size), num_workers)


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """Adds to each record its row among the labels."""

  source: sources.Source
  label_rows: np.ndarray

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[index] | {'label_row': int(self.label_rows[index])}


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
    weight = 0.0
    image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    labels = np.full(self.num_positives, -1, np.int32)
    if row >= 0:
      try:
        image = transforms.random_resized_crop(
          transforms.decode(record['image']),
          self.image_size,
          rng,
          area=self.crop_area,
          flip=self.flip,
        )
        labels = np.asarray(self.labels[row][: self.num_positives], np.int32)
        weight = 1.0
      except transforms.BadImage:
        pass
    return {'image': image, 'labels': labels, 'weight': np.float32(weight)}


@dataclasses.dataclass(frozen=True)
class _OrderedExample:
  """index -> one row of an evaluation batch; padding past the end."""

  source: sources.Source
  image_size: int

  def __call__(self, index):
    image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    label, weight = -1, 0.0
    if index < len(self.source):
      record = self.source[index]
      label = record['label']
      try:
        image = transforms.resize_center_crop(
          transforms.decode(record['image']), self.image_size
        )
        weight = 1.0
      except transforms.BadImage:
        pass
    return {
      'image': image,
      'label': np.int32(label),
      'weight': np.float32(weight),
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
  dataset: grain.MapDataset, batch_size: int
) -> grain.MapDataset:
  """Batches this host's rows of every global batch."""
  hosts = jax.process_count()
  if batch_size % hosts:
    raise ValueError(f'batch {batch_size} is not divisible by {hosts} hosts')
  rows = _HostRows(
    dataset,
    batch_size=batch_size,
    host=jax.process_index(),
    num_hosts=hosts,
  )
  return rows.batch(batch_size // hosts, drop_remainder=True)


def _iterate(
  dataset: grain.MapDataset, num_workers: int
) -> Iterator[dict[str, np.ndarray]]:
  """Reads ahead in threads, or in worker processes."""
  threads = max(1, (os.cpu_count() or 1) // 2)
  batches = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  )
  if num_workers:
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  return iter(batches)
