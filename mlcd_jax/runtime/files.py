"""Reads and writes artefacts: whole files or none, and never a pickle."""

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
import time
from typing import Any
from typing import IO
import weakref
import zipfile

import numpy as np
import pyarrow as pa

from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# Bytes that hold the header of any array without Python objects.
_NPY_HEADER = 65_536

# Where there are no locks, a temporary file this old belongs to no process.
_DEAD_SECONDS = 24 * 3_600


@contextlib.contextmanager
def atomic(
  path: pathlib.Path, *, replace: bool = True
) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` only if the block succeeds.

  Args:
    path: of the file.
    replace: a file that is there by then; without it stays, as others may
      have it mapped.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Random, because the hosts of a job may have the same names and pids.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
  with open(temporary, 'xb') as held:
    try:
      lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield temporary
      with open(temporary, 'rb') as f:
        os.fsync(f.fileno())  # Whole before it has its name, whatever crashes.
      if replace or not path.exists():
        os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def lock(file: IO[Any], operation: int) -> bool:
  """Locks an open file; returns False where its file system has no locks.

  Args:
    file: open for writing, which NFS asks for.
    operation: see `fcntl.flock`.

  Raises:
    BlockingIOError: another process holds it, and LOCK_NB is given.
  """
  try:
    fcntl.flock(file, operation)
  except BlockingIOError:
    raise
  except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP and others.
    return False
  return True


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the folder and holds it for this run; a dead one holds nothing.

  Raises:
    UserError: another process holds it, or it cannot be written.
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
  """Removes what killed processes left of `atomic` writes.

  Args:
    folder: where they may be.
    pattern: of their paths in it.
  """
  for path in folder.glob(pattern):
    with contextlib.suppress(OSError):  # Gone, or held by a living process.
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
  """Reads JSON.

  Args:
    path: the file.
    delete: what to delete where it is broken, to make it anew; `path` where
      not given.

  Raises:
    UserError: it cannot be read or parsed.
  """
  try:
    return json.loads(_content(path))
  except ValueError as e:
    raise errors.UserError(
      f'{path}: cannot be read as JSON ({e}); delete {delete or path} to make '
      'it again'
    ) from e


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Any]]:
  """Yields lines of JSON and what they hold, but for broken ones."""
  for line in lines:
    with contextlib.suppress(ValueError):  # Cut short by a kill, or no text.
      yield line, json.loads(line)


def write_npy(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes one array as .npy."""
  with atomic(path) as temporary:
    with open(temporary, 'wb') as f:
      np.save(f, array, allow_pickle=False)


def read_npy(path: pathlib.Path) -> np.ndarray:
  """Maps one .npy into memory; raises UserError naming a broken file.

  No file stays open: NumPy's own maps hold one each, and of labels there are
  thousands.
  """
  with _opening(path), pa.memory_map(os.fspath(path)) as f:
    content = f.read_buffer()
  try:
    header = io.BytesIO(content[:_NPY_HEADER])
    version = np.lib.format.read_magic(header)
    read = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, by_columns, dtype = read(header)
    if dtype.hasobject:
      raise ValueError('it holds Python objects')
    order = 'F' if by_columns else 'C'
    return np.ndarray(shape, dtype, content, header.tell(), order=order)
  except (ValueError, EOFError, TypeError) as e:
    raise errors.UserError(
      f'{path}: cannot be read as an array ({e}); delete the folder it lies '
      'in to make that stage again'
    ) from e


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """Writes named arrays as one .npz."""
  with atomic(path) as temporary:
    with open(temporary, 'wb') as f:
      np.savez(f, allow_pickle=False, **arrays)


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads what `write_npz` wrote; raises UserError naming a broken file."""
  try:
    with _opening(path), np.load(path, allow_pickle=False) as found:
      return dict(found)
  except (ValueError, EOFError, zipfile.BadZipFile) as e:
    raise errors.UserError(
      f'{path}: cannot be read as arrays ({e}); delete it'
    ) from e


@contextlib.contextmanager
def _opening(path: pathlib.Path) -> Iterator[None]:
  """Names a file that is not to be blamed for what goes wrong with it."""
  try:
    yield
  except OSError as e:
    reason = os.strerror(e.errno) if e.errno else e
    raise errors.UserError(f'{path}: cannot be read ({reason})') from e


def _content(path: pathlib.Path) -> bytes:
  with _opening(path):
    return path.read_bytes()


def check_sha256(folder: pathlib.Path, made: Mapping[str, str]) -> None:
  """Raises UserError naming a file that is not what was made.

  Args:
    folder: where the files are.
    made: relative name -> hex digest.
  """
  for name, digest in made.items():
    if not unchanged(folder, {name: digest}):
      raise errors.UserError(
        f'{folder / name}: missing or changed since it was made; delete '
        f'{folder} to make that stage again'
      )


def unchanged(folder: pathlib.Path, made: Mapping[str, str]) -> bool:
  """Whether all files have the digest they were made with."""
  return all(
    (folder / name).exists() and sha256(folder / name) == digest
    for name, digest in made.items()
  )


def sha256(path: pathlib.Path) -> str:
  """Hex digest of a file's bytes."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


class SharedArray:
  """An array that worker processes map from a file instead of copying it.

  Pickling passes on a path: of the .npy it was read from, or of a temporary
  one that is written the first time and goes with the array.
  """

  def __init__(self, array: np.ndarray, path: pathlib.Path | None = None):
    """Wraps `array`; `path` is the .npy it was mapped from, if it was."""
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
  """Writes an array for other processes; raises RunError where none can be."""
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
