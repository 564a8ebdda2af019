"""Sources: data sets with random access to encoded images.

`data.source` names the kind of a source. A record `source[i]` is a dict:
  key: text that identifies the image; unique in the source, in the spelling of
    `keys.spell`.
  image: the bytes of the encoded image, or a `transforms.BadImage` with the
    reason why they cannot be read.
  label: the class number, or -1 if there is none.
  caption: text, or '' if there is none. Several captions are separate lines.

Some sources have more members than the protocol `Source`:
  labels(): the class number of every record, int [N], -1 if there is none. It
    is required of sources that have classes without names.
  label_problem: a description of what the label field holds if that is not
    class numbers, such as 'text'; otherwise ''.
  num_attributes: the number of labels of a multi-label data set. Its records
    also have `attributes`, the numbers of all labels of the image, and may have
    `ignored`, the numbers of labels that are neither present nor absent.

With `data.boxes_key` a record also has the objects of the image:
  boxes: float32 [n, 4], the left, top, right and bottom of each object in
    pixels of the decoded image. A bad image has none.
  box_labels: int64 [n], the label of each object in the same order, if
    `data.attributes_key` names labels.

To add a source: write its file, give it a line in `_MAKERS`, and name it in
`SOURCES` of config/choices.py.
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

# The module and function that open each kind. A module is imported only when
# needed, because most import a library of their own.
_MAKERS = {
  'embedded': ('tfds', 'make_embedded'),
  'tfds': ('tfds', 'make'),
  'webdataset': ('webdataset', 'make'),
  'folder': ('folder', 'make'),
  'array_record': ('array_record', 'make'),
  'parquet': ('parquet', 'make'),
  'coco': ('coco', 'make'),
}

# Class numbers below this stay as they are. Larger ones are taken for
# identifiers if some numbers below the largest are unused. ImageNet-21k has
# 21,843 classes and uses all its numbers.
_MANY_CLASSES = 10_000


class Source(Protocol):
  """A data set as the stages use it; the records are described above."""

  num_classes: int  # 0 if there are no labels.
  class_names: Sequence[str]  # Empty if they are not known.

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def keys(self) -> np.ndarray:
    """Returns the spelled key of every record in order, bytes [N]."""
    ...


def make(
  data: ml_collections.ConfigDict,
  split: str | None = None,
  found: problems.Problems | None = None,
) -> Source:
  """Opens the source that the `data` fields of a config describe.

  The records listed in `data.bad_keys` are left out, and so are records that
  repeat the key of an earlier one. The sources webdataset, parquet,
  array_record and folder replace '{split}' in `data.path` by the split.

  Args:
    data: the `data` fields of the config.
    split: the name of the split; None stands for `data.split`.
    found: counts the records and files that cannot be used. Without it, too
      many of them raise an error.

  Raises:
    UserError: the data or the split does not exist or has no images, or
      without `found` more than `data.max_bad_fraction` of it is bad.
  """
  split = split or data.split
  strict = found is None
  found = problems.Problems('data') if strict else found
  module, function = _MAKERS[data.source]
  module = importlib.import_module(f'mlcd_jax.data.{module}')
  source = getattr(module, function)(data, split, found)
  source = _without_bad(source, data.get('bad_keys', ''), found)
  if strict and found.total:
    # An unreadable shard counts as one image: nobody knows how many it had.
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
  """Checks the labels of the splits of a data set and renumbers identifiers.

  If the labels are large identifiers, such as 7308324466020115, the classes get
  the numbers 0, 1, 2 and so on in the order of the identifiers. A class has the
  same number in all splits. Labels that count from 0 do not change.

  Args:
    splits: the source of each split, by name. Without a split 'train' no task
      needs labels, so they are not checked.
    field: the config field of the data set, for errors.
    label_key: the name of the label field, for errors.
    keep: True to change no number, because the config has prompts that name
      the classes by number.

  Returns:
    The sources by split, with the new numbers.

  Raises:
    UserError: the labels are not class numbers.
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
  if len(numbers) == most:  # All numbers from 0 on are used.
    return splits
  _log.info(
    '%s: %d classes with numbers up to %d, numbered anew',
    field, len(numbers), most - 1,
  )  # fmt: skip
  return {name: _Numbered(s, numbers) for name, s in splits.items()}


@dataclasses.dataclass(frozen=True)
class _Numbered:
  """A source with renumbered classes.

  Attributes:
    source: the source with the original numbers.
    numbers: the ascending original numbers; the new number is the index here.
  """

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
  """Some records of a source, at the indices `rows`."""

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
  """Returns a source of the records at the indices `rows`, in that order."""
  return _Subset(source, files.SharedArray(np.asarray(rows, np.int64)))


def _without_bad(
  source: Source, bad_keys: str, found: problems.Problems
) -> Source:
  """Returns a source without the listed and the repeated keys.

  Args:
    source: the whole source.
    bad_keys: the path of the file with keys to leave out, or ''.
    found: counts the repeated keys.
  """
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
  """Reads and spells a file of keys, one a line, as `check_data` writes it.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    content = paths.local(path, 'data.bad_keys').read_bytes()
  except OSError as e:
    raise errors.UserError(
      f'data.bad_keys={path}: cannot be read ({e.strerror}); write it with '
      'python -m mlcd_jax.check_data'
    ) from e
  if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    # Older versions of PowerShell write UTF-16.
    content = content.decode('utf-16', 'replace').encode()
  lines = content.removeprefix(codecs.BOM_UTF8).split(b'\n')
  lines = [line.removesuffix(b'\r') for line in lines]  # Windows ends in \r\n.
  return keys_lib.spell([line for line in lines if line])


def multi_hot(source: Source, rows: np.ndarray) -> np.ndarray | None:
  """Reads the attributes of some records.

  Args:
    source: the source.
    rows: int [n], the indices of the records.

  Returns:
    int8 [n, num_attributes]: 1 if the image has the attribute, 0 if it does
    not, and -1 if that is not known. None if the source has no attributes.
  """
  if not getattr(source, 'num_attributes', 0):
    return None
  hot = np.zeros((len(rows), source.num_attributes), np.int8)
  for row, number in zip(hot, rows):
    record = source[int(number)]
    labels = record['attributes']
    # Only negative labels mean an image that nobody annotated. No labels at all
    # mean an annotated image without any of the attributes.
    if len(labels) and np.all(labels < 0):
      row[:] = -1
    # Attributes that may or may not count, such as VOC's difficult objects.
    row[record.get('ignored', [])] = -1
    row[labels[labels >= 0]] = 1
  return hot


def check_same(source: Source, field: str) -> None:
  """Checks that all processes see the same records in the same order.

  Args:
    source: the source to compare.
    field: the config field that an error names.

  Raises:
    RunError: the keys differ.
  """

  def found() -> list[Any]:
    keys = np.ascontiguousarray(source.keys())
    return [len(keys), hashlib.sha256(keys.view(np.uint8)).hexdigest()]

  distributed.check_same(f'records of {field}', found, field)


def _repeated(keys: np.ndarray) -> np.ndarray:
  """Returns the ascending rows whose key an earlier row already has."""
  # Ascending keys cannot repeat, and comparing them is faster than sorting.
  if len(keys) < 2 or np.all(keys[1:] > keys[:-1]):
    return np.zeros(0, np.int64)
  order = np.argsort(keys, kind='stable')
  same = keys[order[1:]] == keys[order[:-1]]
  return np.sort(order[1:][same])
