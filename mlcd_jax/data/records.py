"""Records of many ArrayRecord files, of which few are open at a time.

The library's own data source opens every file it reads from and closes none.
"""

from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

from array_record.python import array_record_module
import numpy as np

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import open_files
from mlcd_jax.runtime import storage

# As the library's data source, for random access.
_OPTIONS = 'readahead_buffer_size:0'
_BUFFER = 32_768


class Part(NamedTuple):
  """Some neighbouring records of a file."""

  file: storage.File
  first: int
  count: int


class Records:
  """Parts of files as one sequence of bytes."""

  def __init__(self, parts: Sequence[Part]):
    """Takes the parts in order."""
    self._parts = list(parts)
    self._ends = np.cumsum([part.count for part in parts])

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> bytes:
    """Returns a record.

    Raises:
      RuntimeError: its checksum is wrong.
      RunError: the file cannot be opened, or is another one by now.
    """
    index = int(index)
    number = int(np.searchsorted(self._ends, index, side='right'))
    file, first, count = self._parts[number]
    place = first + index - (int(self._ends[number]) - count)
    reader = _opened(file)  # Held while it reads.
    return reader.read([place])[0]


def whole(paths: Sequence[str]) -> Records:
  """Returns all records of some files."""

  def part(path):
    file = found(path)
    return Part(file, 0, _opened(file).num_records())

  with futures.ThreadPoolExecutor(16) as pool:
    return Records(list(pool.map(part, paths)))


def found(path: str) -> storage.File:
  """Returns a local file as it is now; of others only the path."""
  if storage.is_url(path):
    return storage.File(path, 0, '')
  return storage.stat(path)


def _opened(file: storage.File) -> array_record_module.ArrayRecordReader:
  try:
    return _reader(file)
  except (OSError, errors.UserError) as e:
    reason = getattr(e, 'strerror', None) or e
    raise errors.RunError(f'{file.path}: cannot be read ({reason})') from e


@open_files.kept
def _reader(file: storage.File) -> array_record_module.ArrayRecordReader:
  if found(file.path) != file:
    raise open_files.changed(file.path)
  try:
    reader = _read_index(file)
    if not reader.num_records() and not storage.is_url(file.path):
      # The reader finds none where too many files are open, too.
      open(file.path, 'rb').close()
      reader = _read_index(file)
    return reader
  except RuntimeError as e:
    if not storage.is_url(file.path):
      open(file.path, 'rb').close()  # Says it if that is why.
    raise errors.RunError(f'{file.path}: cannot be read ({e})') from e


def _read_index(file: storage.File) -> array_record_module.ArrayRecordReader:
  return array_record_module.ArrayRecordReader(
    file.path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
  )
