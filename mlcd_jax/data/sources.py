"""Random-access sources of encoded images, by the name in `data.source`.

Every source gives `source[i] -> {'key', 'image', 'label', 'caption'}`: a key
that is unique in the source and spelled as `keys.spell` does, the encoded
image's bytes, the class (-1 where there is none) and the caption ('' where
there is none; several are lines). TFDS sources with `num_attributes` also give
`attributes`, the numbers of several labels.
"""

from collections.abc import Sequence
import dataclasses
import importlib
import logging
import pathlib
from typing import Any
from typing import Protocol

import ml_collections
import numpy as np

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import manifests
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import problems

_log = logging.getLogger(__name__)

# The module and function that opens each; imported late, each needs a library.
_MAKERS = {
  'embedded': ('tfds', 'make_embedded'),
  'tfds': ('tfds', 'make'),
  'webdataset': ('webdataset', 'make'),
  'folder': ('folder', 'make'),
  'array_record': ('array_record', 'make'),
  'parquet': ('parquet', 'make'),
}
NAMES = tuple(_MAKERS)


class Source(Protocol):
  """What the stages need of a data set."""

  num_classes: int  # 0 where there are no labels.
  class_names: Sequence[str]  # Empty where they are not known.

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def keys(self) -> np.ndarray:
    """Returns the key of every record, in order, see `keys.spell`."""
    ...


def make(
  data: ml_collections.ConfigDict,
  split: str | None = None,
  found: problems.Problems | None = None,
) -> Source:
  """Opens the source that a config's `data` fields describe.

  Records whose key came before, and those named in `data.bad_keys`, are left
  out.

  Args:
    data: source, path, split and what else is under `data` in config.py.
    split: used instead of `data.split` where given.
    found: gets what is left out; where not given, too much of it is an error.

  Raises:
    UserError: the data is not there, has no such split, has no images, or
      more than `data.max_bad_fraction` of it cannot be used.
  """
  split = split or data.split
  strict = found is None
  found = problems.Problems('data') if strict else found
  module, function = _MAKERS[data.source]
  module = importlib.import_module(f'mlcd_jax.data.{module}')
  source = getattr(module, function)(data, split, found)
  source = _without_bad(source, data.get('bad_keys', ''), found)
  if strict and found.total:
    # A shard that cannot be read at all counts as one image.
    found.check(
      len(source) + found.total,
      data.get('max_bad_fraction', 0.01),
      'Mend these files, or raise it to go on without what is left out',
    )
    _log.warning('data: left out: %s', found.summary())
  if not len(source):
    raise errors.UserError(
      f'data.path={data.path}, data.split={split} of '
      f'data.source={data.source} has no images'
    )
  return source


@dataclasses.dataclass(frozen=True)
class _Subset:
  """Some records of a source."""

  source: Source
  rows: files.SharedArray

  @property
  def num_classes(self) -> int:
    return self.source.num_classes

  @property
  def class_names(self) -> Sequence[str]:
    return self.source.class_names

  @property
  def num_attributes(self) -> int:
    return getattr(self.source, 'num_attributes', 0)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[int(self.rows[index])]

  def keys(self) -> np.ndarray:
    return self.source.keys()[self.rows.array]


def _without_bad(
  source: Source, bad_keys: str, found: problems.Problems
) -> Source:
  """Leaves out the listed keys, and all but the first of a key."""
  keys = source.keys()
  keep = np.ones(len(keys), bool)
  if bad_keys:
    keep &= ~np.isin(keys, read_bad_keys(bad_keys))
    _log.info('data: %d images of data.bad_keys left out', np.sum(~keep))
  for row in _repeated(keys):
    if keep[row]:
      found.add(keys_lib.text(keys[row]), 'duplicate key')
    keep[row] = False
  if keep.all():
    return source
  return _Subset(source, files.SharedArray(np.flatnonzero(keep)))


def read_bad_keys(path: str) -> np.ndarray:
  """Reads the keys that `check_data` wrote, one a line, see `keys.spell`."""
  try:
    lines = pathlib.Path(path).read_bytes().split(b'\n')
  except OSError as e:
    raise errors.UserError(
      f'data.bad_keys={path}: cannot be read ({e.strerror}); write it with '
      'python -m mlcd_jax.check_data'
    ) from e
  return keys_lib.spell([line for line in lines if line])


def check_bad_keys(path: str, manifest: manifests.Manifest) -> None:
  """Notes which keys a stage leaves out; they must stay the same.

  Raises:
    UserError: the stage began with others, so that the order was another.
  """
  digest = files.sha256(pathlib.Path(path)) if path else ''
  if manifest.notes.setdefault('bad_keys', digest) != digest:
    raise errors.UserError(
      f'data.bad_keys={path!r}: {manifest.folder} was begun with other keys '
      'left out; use another --workdir, or delete it to make it again'
    )
  manifest.save()


def _repeated(keys: np.ndarray) -> np.ndarray:
  """Rows whose key an earlier row has."""
  if len(keys) < 2 or np.all(keys[1:] > keys[:-1]):  # No need to sort.
    return np.zeros(0, np.int64)
  order = np.argsort(keys, kind='stable')
  same = keys[order[1:]] == keys[order[:-1]]
  return np.sort(order[1:][same])
