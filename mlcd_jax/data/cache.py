"""Paths and writing of the files in `data.cache_dir`.

The cache holds copies of remote files, Arrow copies of Parquet files and
indices of tars. A changed original gets a new path; nothing removes the old
file.
"""

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
  """Returns the path in the cache of a file made from another file.

  The path is a digest of the original's path, size and stamp, so that a changed
  original is not served from an old cache entry.

  Args:
    file: the original, local or remote.
    cache_dir: the value of `data.cache_dir`; '' stands for the folder mlcd_jax
      in the user's cache folder.
    suffix: the end of the path; it tells apart several files made from one
      original.

  Raises:
    UserError: `cache_dir` is '' and the user has no home folder.
  """
  path = file.path if storage.is_url(file.path) else os.path.abspath(file.path)
  identity = f'{path} {file.size} {file.stamp}'
  # 'replace' accepts file names that are not UTF-8. 32 hex digits are 128 bits,
  # enough that no two originals share a path.
  digest = hashlib.sha256(identity.encode('utf-8', 'replace')).hexdigest()
  return _folder(cache_dir) / f'{digest[:32]}{suffix}'


def _folder(cache_dir: str) -> pathlib.Path:
  """Returns the folder of the cache; see `place` for the argument."""
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
  """Yields a temporary path that is renamed to `path` if the block succeeds.

  If another process wrote `path` in the meantime, its file stays.

  Args:
    path: a path in the cache, from `place`.

  Raises:
    UserError: the folder cannot be written.
    RunError: the disk is full.
  """
  try:
    # A file that other processes have mapped must not be replaced.
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
  """Returns the local path of a file; a URL is downloaded to the cache first.

  Args:
    file: the local or remote file.
    cache_dir: the folder of the cache; see `place`.

  Raises:
    UserError: the file cannot be read, or the cache cannot be written.
    RunError: the disk is full.
  """
  if not storage.is_url(file.path):
    return file.path
  copy = place(file, cache_dir, pathlib.PurePosixPath(file.path).suffix)
  if not copy.exists():
    with writing(copy) as temporary, open(temporary, 'wb') as target:
      for block in storage.each(file.path, _blocks(file.path)):
        target.write(block)
  return str(copy)


def _blocks(path: str) -> Iterator[bytes]:
  """Yields the content of a file in blocks of 16 MiB."""
  with storage.open_file(path) as f:
    while block := f.read(1 << 24):
      yield block
