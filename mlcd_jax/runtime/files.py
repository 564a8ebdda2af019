"""Reads and writes a run's files atomically and without pickle."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pathlib
import secrets
import tempfile
import threading
import time
from typing import Any
from typing import IO
import weakref
import zipfile

import numpy as np
import pyarrow as pa

from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# Bytes to read for the header of a .npy file. Headers of version 1.0 are
# shorter than 64 KiB.
NPY_HEADER = 65_536

# NumPy parses a header as Python. CPython 3.11 counts the depth of that over
# all threads (its issue 106905): two headers at once can end in a SystemError.
_PARSING = threading.Lock()

# Age in seconds of a temporary file that counts as abandoned on a file system
# without locks: no single write takes a day.
_DEAD_SECONDS = 24 * 3_600


@contextlib.contextmanager
def atomic(
  path: pathlib.Path, *, replace: bool = True
) -> Iterator[pathlib.Path]:
  """Yields a temporary path that is renamed to `path` if the block succeeds.

  Args:
    path: the file to write.
    replace: replaces a file that exists at the end. If False, the existing file
      stays, because other processes may have it mapped.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # The name is random because hosts of a job may share host names and pids.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
  with open(temporary, 'xb') as held:
    try:
      lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield temporary
      with open(temporary, 'rb') as f:
        # The content reaches the disk before the name does, so that a crash
        # leaves no half-written file under `path`.
        os.fsync(f.fileno())
      if replace or not path.exists():
        os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def lock(file: IO[Any], operation: int) -> bool:
  """Locks an open file.

  Args:
    file: the file, open for writing because NFS requires it.
    operation: the flags of `fcntl.flock`.

  Returns:
    True if the file is locked, False if its file system has no locks.

  Raises:
    BlockingIOError: another process holds the lock, and LOCK_NB is given.
  """
  try:
    fcntl.flock(file, operation)
  except BlockingIOError:
    raise
  except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: no locks here.
    return False
  return True


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Creates the workdir and locks it for the duration of the block.

  The system releases the lock when the process dies.

  Raises:
    UserError: another process holds the lock, or the folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / 'lock', 'w')
  except OSError as e:
    raise errors.UserError(
      f'--workdir={workdir}: cannot be written ({e.strerror})'
    ) from e
  with file:
    try:
      if not lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        _log.warning(
          '--workdir=%s: its file system has no locks; see to it that no other '
          'process writes there', workdir,
        )  # fmt: skip
    except BlockingIOError as e:
      raise errors.UserError(
        f'--workdir={workdir} is in use by another process; wait for it, or '
        'use another folder'
      ) from e
    yield


def remove_leftovers(folder: pathlib.Path, pattern: str = '**/.*.tmp') -> None:
  """Removes temporary files that killed processes left behind in `atomic`.

  Args:
    folder: the folder to search.
    pattern: the glob of the temporary files, relative to the folder.
  """
  for path in folder.glob(pattern):
    # An OSError means that the file is gone or that a live process holds it.
    with contextlib.suppress(OSError):
      with open(path, 'r+b') as f:
        locked_ = lock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        age = time.time() - os.fstat(f.fileno()).st_mtime
        if locked_ or age > _DEAD_SECONDS:
          path.unlink()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON with sorted keys."""
  with atomic(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')


def read_json(path: pathlib.Path, delete: pathlib.Path | None = None) -> Any:
  """Reads a JSON file.

  Args:
    path: the file.
    delete: the path that an error tells the user to delete; defaults to
      `path`.

  Raises:
    UserError: the file cannot be read or parsed.
  """
  try:
    return json.loads(_content(path))
  except ValueError as e:
    raise errors.UserError(
      f'{path}: cannot be read as JSON ({e}); delete {delete or path} to make '
      'it again'
    ) from e


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Any]]:
  """Yields each line with its parsed JSON value, and skips broken lines."""
  for line in lines:
    # A kill can cut the last line short or leave bytes that are not text.
    with contextlib.suppress(ValueError):
      yield line, json.loads(line)


def write_npy(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes one array as a .npy file."""
  with atomic(path) as temporary:
    with open(temporary, 'wb') as f:
      np.save(f, array, allow_pickle=False)


def npy_header(
  start: bytes,
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  """Parses the header of an array in the .npy format; threads may call it.

  Args:
    start: the first bytes of the file, NPY_HEADER of them if there are so many.

  Returns:
    The shape, whether the array lies by columns, its type, and the offset of
    its first byte.

  Raises:
    ValueError: it is no such header.
  """
  header = io.BytesIO(start)
  version = np.lib.format.read_magic(header)
  read = (
    np.lib.format.read_array_header_1_0
    if version == (1, 0)
    else np.lib.format.read_array_header_2_0
  )
  with _PARSING:
    shape, by_columns, dtype = read(header)
  return shape, by_columns, dtype, header.tell()


def read_npy(path: pathlib.Path) -> np.ndarray:
  """Maps one .npy file into memory.

  The file does not stay open. NumPy's own maps keep a file open each, and a
  run has thousands of label shards.

  Raises:
    UserError: the file cannot be read or is not a plain array.
  """
  with _opening(path), pa.memory_map(os.fspath(path)) as f:
    content = f.read_buffer()
  try:
    shape, by_columns, dtype, offset = npy_header(content[:NPY_HEADER])
    if dtype.hasobject:
      raise ValueError('it holds Python objects')
    order = 'F' if by_columns else 'C'
    return np.ndarray(shape, dtype, content, offset, order=order)
  except (ValueError, EOFError, TypeError) as e:
    raise errors.UserError(
      f'{path}: cannot be read as an array ({e}); delete the folder it lies '
      'in to make that stage again'
    ) from e


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """Writes named arrays as one .npz file."""
  with atomic(path) as temporary:
    with open(temporary, 'wb') as f:
      np.savez(f, allow_pickle=False, **arrays)


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all arrays of a .npz file.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    with _opening(path), np.load(path, allow_pickle=False) as found:
      return dict(found)
  except (ValueError, EOFError, zipfile.BadZipFile) as e:
    raise errors.UserError(
      f'{path}: cannot be read as arrays ({e}); delete it'
    ) from e


@contextlib.contextmanager
def _opening(path: pathlib.Path) -> Iterator[None]:
  """Turns an OSError of the block into a UserError that names the file."""
  try:
    yield
  except OSError as e:
    reason = os.strerror(e.errno) if e.errno else e
    raise errors.UserError(f'{path}: cannot be read ({reason})') from e


def _content(path: pathlib.Path) -> bytes:
  """Returns the bytes of a file; raises UserError if it cannot be read."""
  with _opening(path):
    return path.read_bytes()


def check_sha256(
  folder: pathlib.Path,
  made: Mapping[str, str],
  delete: pathlib.Path | None = None,
) -> None:
  """Checks that files have the digests that were recorded for them.

  Args:
    folder: the folder of the files.
    made: the hex digest of each file, by its name relative to the folder.
    delete: the path that an error tells the user to delete; defaults to
      `folder`.

  Raises:
    UserError: a file is missing or has another digest.
  """
  for name, digest in made.items():
    if not unchanged(folder, {name: digest}):
      raise errors.UserError(
        f'{folder / name}: missing or changed since it was made; delete '
        f'{delete or folder} to make that stage again'
      )


def unchanged(folder: pathlib.Path, made: Mapping[str, str]) -> bool:
  """Returns whether all files exist with the recorded digests."""
  return all(
    (folder / name).exists() and sha256(folder / name) == digest
    for name, digest in made.items()
  )


def sha256(path: pathlib.Path) -> str:
  """Returns the hex digest of a file's bytes."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


class SharedArray:
  """An array that worker processes map from a file instead of copying it.

  Pickling passes on only the path of a .npy file. It is the file that the array
  was read from, or a temporary one. The temporary file is written at the first
  pickling and is removed together with the array.
  """

  def __init__(self, array: np.ndarray, path: pathlib.Path | None = None):
    """Wraps an array.

    Args:
      array: the array.
      path: the .npy file that the array was mapped from, if any.
    """
    self.array = array
    self._path = path

  def __len__(self) -> int:
    return len(self.array)

  def __getitem__(self, index):
    return self.array[index]

  def __getstate__(self) -> str:
    if self._path is None:
      self._path = _temporary_npy(self.array)
      weakref.finalize(self, self._path.unlink, missing_ok=True)
    return str(self._path)

  def __setstate__(self, state: str) -> None:
    self._path = pathlib.Path(state)
    self.array = read_npy(self._path)


def _temporary_npy(array: np.ndarray) -> pathlib.Path:
  """Writes an array to a temporary .npy file and returns its path.

  Raises:
    RunError: the temporary folder cannot be written, for example if it is full.
  """
  path = None
  try:
    handle, name = tempfile.mkstemp('.npy', 'mlcd_jax_')
    path = pathlib.Path(name)
    with os.fdopen(handle, 'wb') as f:
      np.save(f, array, allow_pickle=False)
  except OSError as e:
    if path:
      path.unlink(missing_ok=True)
    raise errors.RunError(
      f'{path.parent if path else "TMPDIR"}: {array.nbytes:,} bytes for '
      f'data.num_workers cannot be written ({e.strerror or e}); make space '
      'there, or name another folder in TMPDIR'
    ) from e
  return path
