"""Reads the records of many ArrayRecord files, with few files open at a time.

array_record's own data source opens every file that it reads and closes none,
so it can exceed the limit of open files.
"""

from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

from array_record.python import array_record_module
import numpy as np

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import open_files
from mlcd_jax.runtime import storage

# The values for random access in array_record's own data source.
_OPTIONS = 'readahead_buffer_size:0'
_BUFFER = 32_768


class Part(NamedTuple):
  """A range of records of a file.

  Attributes:
    file: the file, as it was when it was found.
    first: the index of the first record.
    count: the number of records.
  """

  file: storage.File
  first: int
  count: int


class Records:
  """Records of several files as one sequence of bytes."""

  def __init__(self, parts: Sequence[Part]):
    """Concatenates parts of files."""
    self._parts = list(parts)
    self._ends = np.cumsum([part.count for part in parts])

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> bytes:
    """Returns a record.

    Raises:
      RuntimeError: the checksum of the record is wrong.
      RunError: the file cannot be opened or has changed since it was found.
    """
    index = int(index)
    number = int(np.searchsorted(self._ends, index, side='right'))
    file, first, count = self._parts[number]
    place = first + index - (int(self._ends[number]) - count)
    # The reference keeps the reader open during `read`, even if the cache of
    # open files drops it.
    reader = _opened(file)
    return reader.read([place])[0]


def whole(paths: Sequence[str]) -> Records:
  """Returns all records of some files in order.

  Raises:
    UserError: a file does not exist.
    RunError: a file cannot be opened.
  """

  def part(path):
    file = found(path)
    return Part(file, 0, _opened(file).num_records())

  with futures.ThreadPoolExecutor(16) as pool:
    return Records(list(pool.map(part, paths)))


def found(path: str) -> storage.File:
  """Returns a file with its current size and stamp, or a URL without them."""
  if storage.is_url(path):
    return storage.File(path, 0, '')
  return storage.stat(path)


def _opened(file: storage.File) -> array_record_module.ArrayRecordReader:
  """Returns a reader, opened or from the cache; all errors are RunErrors."""
  try:
    return _reader(file)
  except (OSError, errors.UserError) as e:
    reason = getattr(e, 'strerror', None) or e
    raise errors.RunError(f'{file.path}: cannot be read ({reason})') from e


@open_files.kept
def _reader(file: storage.File) -> array_record_module.ArrayRecordReader:
  """Opens a file.

  Raises:
    OSError: the file cannot be opened, for example because too many are.
    UserError: the file is missing.
    RunError: the file has changed or is not an ArrayRecord.
  """
  if found(file.path) != file:
    raise open_files.changed(file.path)
  try:
    reader = _read_index(file)
    if not reader.num_records() and not storage.is_url(file.path):
      # The library reports no records also if too many files are open. `open`
      # then raises the true error, which makes `open_files.kept` close some.
      open(file.path, 'rb').close()
      reader = _read_index(file)
    return reader
  except RuntimeError as e:
    if not storage.is_url(file.path):
      open(file.path, 'rb').close()  # Raises an OSError if that is the cause.
    raise errors.RunError(f'{file.path}: cannot be read ({e})') from e


def _read_index(file: storage.File) -> array_record_module.ArrayRecordReader:
  """Creates a reader, which reads the file's index of records."""
  return array_record_module.ArrayRecordReader(
    file.path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
  )
