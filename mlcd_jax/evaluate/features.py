"""Frozen features of labelled data sets, extracted once for all tasks.

Shapes: N images, D features.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import pathlib
import re
from typing import Any

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import sharding
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import files
from mlcd_jax.runtime import progress as progress_lib


@dataclasses.dataclass(frozen=True)
class Split:
  """One split through one encoder; bad images are left out.

  Attributes:
    features: float32 [N, D].
    labels: int32 [N], -1 where there is none.
    records: int64 [N], each row's place in the source.
    source: whose records they are.
  """

  features: np.ndarray
  labels: np.ndarray
  records: np.ndarray | None = None
  source: sources.Source | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def hot(self) -> np.ndarray | None:
    """Returns the labels where records have several each.

    Returns:
      int8 [N, C]: 1 and 0, and -1 where neither is known; such a label is
      left out of fits and scores. None where records have one label at most.
    """
    return self._hot

  @functools.cached_property
  def _hot(self) -> np.ndarray | None:
    if not getattr(self.source, 'num_attributes', 0):
      return None
    hot = np.zeros((len(self), self.source.num_attributes), np.int8)
    for row, number in zip(hot, self.records):
      record = self.source[int(number)]
      labels = record['attributes']
      if len(labels) and np.all(labels < 0):  # Nobody has said what is there.
        row[:] = -1
      row[record.get('ignored', [])] = -1
      row[labels[labels >= 0]] = 1
    return hot

  def values(self, name: str) -> list[Any]:
    """Returns one value of every record, such as its `caption`."""
    return [self.source[int(record)][name] for record in self.records]

  def labelled(self, *, several: bool) -> 'Split':
    """Leaves out the rows without a label, and their records.

    Args:
      several: labels an image; otherwise its class.
    """
    known = self.labels >= 0
    if several:
      hot = self.hot()
      known = np.ones(len(self), bool) if hot is None else np.any(hot >= 0, 1)
    if known.all():
      return self
    source = self.source and sources.take(self.source, self.records[known])
    return Split(
      self.features[known],
      self.labels[known],
      np.arange(np.sum(known)),
      source,
    )


@dataclasses.dataclass(frozen=True)
class Data:
  """What a task gets: one data set through one encoder.

  Every row has a label, if the task is one that needs them.

  Attributes:
    train: for fitting; None where the data set has none, and then the task
      is one of labelled.UNFITTED.
    test: for scoring.
    num_classes: of the data set, whether they occur or not.
    mesh: of all devices.
    encoder: what made the features.
    extract: (source, its name) -> Split, of any other images, cached too.
    validation: for choosing; None where the data set has none.
    config: the fields of evaluate.datasets.<name>.
    shared: what tasks keep for each other, over all data sets of an encoder.
  """

  train: Split | None
  test: Split
  num_classes: int
  mesh: Mesh
  encoder: encoders.Encoder | None = None
  extract: Callable[[sources.Source, str], Split] | None = None
  validation: Split | None = None
  config: ml_collections.ConfigDict = dataclasses.field(
    default_factory=ml_collections.ConfigDict
  )
  shared: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Extractor:
  """Encodes sources, each once, and keeps the features on disk.

  A file is used again if the source has the same keys and the encoder gives
  the same bits for the first batch; otherwise it is made anew.

  Attributes:
    encoder: see `encoders.Encoder`.
    name: of the encoder, in file names and progress lines.
    batch_size: images a call, over all hosts.
    folder: where the files are; None keeps nothing.
  """

  encoder: encoders.Encoder
  name: str
  batch_size: int
  folder: pathlib.Path | None = None

  def __call__(self, source: sources.Source, name: str) -> Split:
    """Returns the features of the source's images that decode.

    Args:
      source: images, with labels or without.
      name: of the data set and split.
    """
    sources.check_same(source, f'evaluate.datasets ({name})')
    path = self._path(name)
    keys = _digest(source)
    progress = progress_lib.Progress(
      f'features {self.name} {name}', len(source), unit='images'
    )
    rows, values = [], []
    for batch in self._batches(source):
      rows.append(self.encoder.encode(batch['image']))
      if path and len(rows) == 1:
        kept = _kept(path, keys, rows[0])
        if kept:
          found = {k: kept[k] for k in ('features', 'labels', 'records')}
          return Split(**found, source=source)
      # On the way that the images went, so that they come in the same order.
      values.append(
        sharding.all_rows(
          self.encoder.mesh,
          np.stack([batch['label'], batch['weight'] > 0], 1).astype(np.int32),
        )
      )
      progress.update(min(len(source), len(rows) * self.batch_size))
    labels, good = np.concatenate(values).T
    good = good > 0
    found = {
      'features': np.concatenate(rows)[good],
      'labels': labels[good],
      'records': np.flatnonzero(good),
    }
    if path:
      if distributed.is_main():
        keys = np.frombuffer(keys, np.uint8)
        files.write_npz(path, keys=keys, first=rows[0], **found)
      distributed.barrier(f'features {self.name} {name}')
    return Split(**found, source=source)

  def _batches(self, source):
    return pipelines.ordered_batches(
      source,
      batch_size=self.batch_size,
      image_size=self.encoder.image_size,
      prepare=self.encoder.prepare,
      rows=sharding.own_rows(self.encoder.mesh, self.batch_size),
    )

  def _path(self, name: str) -> pathlib.Path | None:
    if self.folder is None:
      return None
    stem = re.sub(r'[^\w.-]+', '_', f'{self.name} {name}').strip('_')
    return self.folder / f'{stem}.npz'


def _kept(
  path: pathlib.Path, keys: bytes, first: np.ndarray
) -> dict[str, np.ndarray] | None:
  """What a file has, if it is of these keys and the first batch's features."""
  found = {}

  def is_same() -> bool:
    if not path.exists():
      return False
    found.update(files.read_npz(path))
    return found['keys'].tobytes() == keys and np.array_equal(
      found['first'], first
    )

  if not distributed.decide('kept features', is_same):
    return None
  return found or files.read_npz(path)


def _digest(source: sources.Source) -> bytes:
  """Of the keys, and of the numbers of the classes where they are new."""
  digest = hashlib.sha256(b'\n'.join(source.keys().tolist()))
  digest.update(np.asarray(getattr(source, 'numbers', ()), np.int64))
  return digest.digest()
