"""Frozen features of labelled data sets, extracted once for all tasks.

Shapes: N images, D features, C classes.
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
  """The features and labels of one split, without images that do not decode.

  Attributes:
    features: float32 [N, D].
    labels: int32 [N], the class of each image, or -1 if it has none.
    records: int64 [N], the index of each row's record in `source`.
    source: the source of the records.
  """

  features: np.ndarray
  labels: np.ndarray
  records: np.ndarray | None = None
  source: sources.Source | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def hot(self) -> np.ndarray | None:
    """Returns the attributes of all images, for sources with several each.

    Returns:
      int8 [N, C]: 1 if the image has the attribute, 0 if it does not, and -1
      if that is not known. Fits and scores leave out the -1. None if the source
      has no attributes.
    """
    return self._hot

  @functools.cached_property
  def _hot(self) -> np.ndarray | None:
    """Reads the attributes once; `hot` returns them."""
    if self.source is None:
      return None
    return sources.multi_hot(self.source, self.records)

  def values(self, name: str) -> list[Any]:
    """Returns one value of every record, such as its `caption`."""
    return [self.source[int(record)][name] for record in self.records]

  def labelled(self, *, several: bool) -> 'Split':
    """Returns the split without the images that lack a label.

    Args:
      several: True to keep images with at least one known attribute, False to
        keep images with a class.
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
  """The input of a task: the features of one data set from one encoder.

  For a task that needs labels, every row has one.

  Attributes:
    train: the split to fit on. None if the data set has none; then the task is
      one of labelled.UNFITTED.
    test: the split to score.
    num_classes: C, the number of classes of the data set, including those
      without an image; 0 if it has no classes.
    mesh: the mesh of all devices.
    encoder: the encoder that made the features.
    extract: a function (source, name) -> Split that encodes other images and
      caches their features under the name.
    validation: the split to choose settings on; None if the data set has none.
    config: the fields of evaluate.datasets.<name>.
    shared: a dict in which tasks keep results for other tasks and data sets,
      such as the text tower; one for each encoder.
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
  """Encodes sources and caches their features on disk.

  A cached file is used again if the source has the same keys and the encoder
  gives bit-identical features for the first batch. Otherwise it is replaced.

  Attributes:
    encoder: the encoder; see `encoders.Encoder`.
    name: the name of the encoder in file names and progress lines.
    batch_size: the number of images in a global batch.
    folder: the folder of the cached files; None caches nothing.
  """

  encoder: encoders.Encoder
  name: str
  batch_size: int
  folder: pathlib.Path | None = None

  def __call__(self, source: sources.Source, name: str) -> Split:
    """Returns the features of the images that decode; all processes call it.

    Args:
      source: the images, with or without labels.
      name: the name of the data set and split.

    Raises:
      RunError: the processes see different records.
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
      # One batch is enough to tell if the encoder is still the same.
      if path and len(rows) == 1:
        kept = _kept(path, keys, rows[0])
        if kept:
          found = {k: kept[k] for k in ('features', 'labels', 'records')}
          return Split(**found, source=source)
      # Gathered like the features, so that labels and features have one order.
      values.append(
        sharding.all_rows(
          self.encoder.mesh,
          np.stack([batch['label'], batch['weight'] > 0], 1).astype(np.int32),
        )
      )
      progress.update(min(len(source), len(rows) * self.batch_size))
    labels, good = np.concatenate(values).T
    # The weight is 0 for images that do not decode and for padding.
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
    """Yields this host's rows of the batches; see `ordered_batches`."""
    return pipelines.ordered_batches(
      source,
      batch_size=self.batch_size,
      image_size=self.encoder.image_size,
      prepare=self.encoder.prepare,
      rows=sharding.own_rows(self.encoder.mesh, self.batch_size),
    )

  def _path(self, name: str) -> pathlib.Path | None:
    """Returns the path of the cached file; None if nothing is cached."""
    if self.folder is None:
      return None
    # Names may have characters that file names must not have.
    stem = re.sub(r'[^\w.-]+', '_', f'{self.name} {name}').strip('_')
    return self.folder / f'{stem}.npz'


def _kept(
  path: pathlib.Path, keys: bytes, first: np.ndarray
) -> dict[str, np.ndarray] | None:
  """Reads a cached file in all processes; None if it is absent or stale.

  Args:
    path: the path of the file.
    keys: the digest of the source, from `_digest`.
    first: the features of the first batch, from the encoder of now.
  """
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
  # Only process 0 called `is_same`.
  return found or files.read_npz(path)


def _digest(source: sources.Source) -> bytes:
  """Returns the SHA-256 of a source's keys.

  For a source with renumbered classes it includes the original numbers, since
  the cached labels are places in their list.
  """
  digest = hashlib.sha256(b'\n'.join(source.keys().tolist()))
  digest.update(np.asarray(getattr(source, 'numbers', ()), np.int64))
  return digest.digest()
