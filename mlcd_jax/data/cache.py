"""What is kept of the data in `data.cache_dir`: copies and indices."""

from collections.abc import Iterator
import contextlib
import hashlib
import os
import pathlib

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import storage


def place(file: storage.File, cache_dir: str, suffix: str) -> pathlib.Path:
  """The place of what is made of a file, another one once it changes.

  Args:
    file: local or remote.
    cache_dir: `data.cache_dir`; '' = mlcd_jax in the user's cache folder.
    suffix: tells apart what is made of it.

  Raises:
    UserError: no folder is given, and the user has no home.
  """
  path = file.path if storage.is_url(file.path) else os.path.abspath(file.path)
  identity = f'{path} {file.size} {file.stamp}'
  digest = hashlib.sha256(identity.encode('utf-8', 'replace')).hexdigest()
  return _folder(cache_dir) / f'{digest[:32]}{suffix}'


def _folder(cache_dir: str) -> pathlib.Path:
  if cache_dir:
    return paths.local(cache_dir, 'data.cache_dir')
  if os.environ.get('XDG_CACHE_HOME'):
    return paths.local(os.environ['XDG_CACHE_HOME']) / 'mlcd_jax'
  if paths.home() is None:
    raise errors.UserError(
      'data.cache_dir: there is no home folder (HOME is not set) for '
      '~/.cache/mlcd_jax; name a folder for copies of the data'
    )
  return pathlib.Path(paths.home(), '.cache/mlcd_jax')


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """As `files.atomic`, for a path of `place`; the first one written stays.

  Raises:
    UserError: the folder cannot be written.
    RunError: the disk is full.
  """
  try:
    with files.atomic(path, replace=False) as temporary:
      yield temporary
  except OSError as e:
    full = e.errno in errors.DISK_FULL
    kind = errors.RunError if full else errors.UserError
    raise kind(
      f'data.cache_dir={path.parent}: cannot be written '
      f'({os.strerror(e.errno) if e.errno else e}); '
      + 'make space there, or ' * full
      + 'name another folder for copies of the data'
    ) from e


def local_copy(file: storage.File, cache_dir: str) -> str:
  """Returns a path that can be opened without fsspec, downloaded if need be."""
  if not storage.is_url(file.path):
    return file.path
  copy = place(file, cache_dir, pathlib.PurePosixPath(file.path).suffix)
  if not copy.exists():
    with writing(copy) as temporary, open(temporary, 'wb') as target:
      for block in storage.each(file.path, _blocks(file.path)):
        target.write(block)
  return str(copy)


def _blocks(path: str) -> Iterator[bytes]:
  with storage.open_file(path) as f:
    while block := f.read(1 << 24):
      yield block
