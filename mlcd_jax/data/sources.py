"""Random-access sources of encoded images, by the name in `data.source`.

Every source gives `source[i] -> {'key', 'image', 'label', 'caption'}`: a key
that is unique in the source and spelled as `keys.spell` does, the encoded
image's bytes or the `transforms.BadImage` why they cannot be read, the class
(-1 where there is none) and the caption ('' where there is none; several are
lines). Sources whose class numbers have no names also give all `labels()`, int
[N], and where the field holds no class numbers, `label_problem` says what it
holds. Sources with `num_attributes` also give `attributes`, the numbers of
several labels, and some give `ignored`, those that may be there or not.
"""

import codecs
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import importlib
import logging
from typing import Any
from typing import Protocol

import ml_collections
import numpy as np

from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems

_log = logging.getLogger(__name__)

# The module and function that opens each; imported late, each needs a library.
_MAKERS = {
  'embedded': ('tfds', 'make_embedded'),
  'tfds': ('tfds', 'make'),
  'webdataset': ('webdataset', 'make'),
  'folder': ('folder', 'make'),
  'array_record': ('array_record', 'make'),
  'parquet': ('parquet', 'make'),
  'coco': ('coco', 'make'),
}

# So many classes have had numbers from 0 on (ImageNet-21k: 21,843, all used);
# of more, some that are not used are taken for identifiers.
_MANY_CLASSES = 10_000


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
    _log.warning('data: not used: %s', found.summary())
  elif strict and found.left_out:
    _log.info('data: not used: %s', found.summary())
  if not len(source):
    raise errors.UserError(
      f'data.path={data.path}, data.split={split} of '
      f'data.source={data.source} has no images; {found.summary()}'
    )
  return source


def number_classes(
  splits: Mapping[str, Source], *, field: str, label_key: str, keep: bool
) -> dict[str, Source]:
  """Checks the labels of a data set's splits and numbers identifiers anew.

  Class numbers such as 7308324466020115 of three classes become 0, 1 and 2,
  in the order of the numbers and the same in all splits. Numbers from 0 on
  stay as they are.

  Args:
    splits: name -> source; without 'train' no labels are needed.
    field: of the data set in the config, for errors.
    label_key: of the data set.
    keep: numbers stay as they are in any case, since they have names.

  Raises:
    UserError: the labels are no class numbers.
  """
  splits = dict(splits)
  for name, source in splits.items() if 'train' in splits else ():
    problem = getattr(source, 'label_problem', '')
    if problem:
      raise errors.UserError(
        f'{field}.label_key={label_key}: is {problem} in the {name} split, '
        'and no class number; name the feature that has classes'
      )
  most = max(source.num_classes for source in splits.values())
  named = keep or any(source.class_names for source in splits.values())
  if named or most <= _MANY_CLASSES:
    return splits
  numbers = np.unique(np.concatenate([s.labels() for s in splits.values()]))
  numbers = numbers[numbers >= 0]
  if len(numbers) == most:
    return splits
  _log.info(
    '%s: %d classes with numbers up to %d, numbered anew',
    field, len(numbers), most - 1,
  )  # fmt: skip
  return {name: _Numbered(s, numbers) for name, s in splits.items()}


@dataclasses.dataclass(frozen=True)
class _Numbered:
  """A source whose class numbers are places in a list of them."""

  source: Source
  numbers: np.ndarray
  class_names = ()
  label_problem = ''

  @property
  def num_classes(self) -> int:
    return len(self.numbers)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.source[index]
    if record['label'] < 0:
      return record
    return record | {
      'label': int(np.searchsorted(self.numbers, record['label']))
    }

  def keys(self) -> np.ndarray:
    return self.source.keys()

  def labels(self) -> np.ndarray:
    labels = self.source.labels()
    return np.where(labels < 0, -1, np.searchsorted(self.numbers, labels))


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
  def label_problem(self) -> str:
    return getattr(self.source, 'label_problem', '')

  @property
  def num_attributes(self) -> int:
    return getattr(self.source, 'num_attributes', 0)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[int(self.rows[index])]

  def keys(self) -> np.ndarray:
    return self.source.keys()[self.rows.array]

  def labels(self) -> np.ndarray:
    return self.source.labels()[self.rows.array]


def take(source: Source, rows: np.ndarray) -> Source:
  """Returns some records of a source, by their places in it."""
  return _Subset(source, files.SharedArray(np.asarray(rows, np.int64)))


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
    content = paths.local(path, 'data.bad_keys').read_bytes()
  except OSError as e:
    raise errors.UserError(
      f'data.bad_keys={path}: cannot be read ({e.strerror}); write it with '
      'python -m mlcd_jax.check_data'
    ) from e
  if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    content = content.decode('utf-16', 'replace').encode()  # PowerShell's.
  lines = content.removeprefix(codecs.BOM_UTF8).split(b'\n')
  lines = [line.removesuffix(b'\r') for line in lines]  # As Windows ends them.
  return keys_lib.spell([line for line in lines if line])


def check_same(source: Source, field: str) -> None:
  """Raises RunError where processes see other records, or another order."""

  def found() -> list[Any]:
    keys = np.ascontiguousarray(source.keys())
    return [len(keys), hashlib.sha256(keys.view(np.uint8)).hexdigest()]

  distributed.check_same(f'records of {field}', found, field)


def _repeated(keys: np.ndarray) -> np.ndarray:
  """Rows whose key an earlier row has."""
  if len(keys) < 2 or np.all(keys[1:] > keys[:-1]):  # No need to sort.
    return np.zeros(0, np.int64)
  order = np.argsort(keys, kind='stable')
  same = keys[order[1:]] == keys[order[:-1]]
  return np.sort(order[1:][same])
