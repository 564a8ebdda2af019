"""Reads and writes artefacts: whole files or none, and never a pickle."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any
import weakref
import zipfile

import numpy as np

from mlcd_jax import errors


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` only if the block succeeds."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    with open(temporary, 'rb') as f:
      os.fsync(f.fileno())  # Whole before it has its name, whatever crashes.
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the folder and holds it for this run; a dead one holds nothing.

  Raises:
    UserError: another process holds it, or it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / 'lock', 'w')
  except OSError as e:
    raise errors.UserError(
      f'--workdir={workdir}: cannot be written ({e.strerror})'
    ) from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise errors.UserError(
        f'--workdir={workdir} is in use by another process; wait for it, or '
        'use another folder'
      ) from e
    yield


def remove_leftovers(folder: pathlib.Path) -> None:
  """Removes what killed processes left of `atomic` writes."""
  for path in folder.rglob('.*.tmp'):
    path.unlink(missing_ok=True)


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
    return json.loads(path.read_text())
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
    raise errors.UserError(
      f'{path}: cannot be read as JSON ({e}); delete {delete or path} to make '
      'it again'
    ) from e


def write_npy(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes one array as .npy."""
  with atomic(path) as temporary:
    with open(temporary, 'wb') as f:
      np.save(f, array, allow_pickle=False)


def read_npy(path: pathlib.Path) -> np.ndarray:
  """Maps one .npy into memory; raises UserError naming a broken file."""
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
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
    with np.load(path, allow_pickle=False) as found:
      return dict(found)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise errors.UserError(
      f'{path}: cannot be read as arrays ({e}); delete it'
    ) from e


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
      handle, name = tempfile.mkstemp('.npy', 'mlcd_jax_')
      with os.fdopen(handle, 'wb') as f:
        np.save(f, self.array, allow_pickle=False)
      self._path = pathlib.Path(name)
      weakref.finalize(self, self._path.unlink, missing_ok=True)
    return str(self._path)

  def __setstate__(self, state: str) -> None:
    self._path = pathlib.Path(state)
    self.array = read_npy(self._path)
