"""A cache of open files for many threads, within the limit of open files."""

from collections.abc import Callable
import errno
import functools
import io
import os
import resource
from typing import TypeVar

from mlcd_jax.runtime import errors

T = TypeVar('T')

# A cache holds a quarter of the files that the process may open, since
# libraries open files too.
_SHARE = 4
# The most files in a cache where the limit allows more.
_MOST = 8_192


def kept(open_: Callable[..., T]) -> Callable[..., T]:
  """Caches the files that a function opened most recently.

  The cache may drop a file at any time. So the caller must hold a reference to
  it during use, and the file must close itself when no reference is left. Two
  threads may open the same file twice.

  Args:
    open_: opens a file; its arguments must be hashable.

  Returns:
    A function with the same arguments and result as `open_`.
  """

  @functools.cache
  def cache():
    # It is created at the first call, because a command raises the limit of
    # open files only after this module is imported.
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
      limit = _SHARE * _MOST
    return functools.lru_cache(max(1, min(_MOST, limit // _SHARE)))(open_)

  @functools.wraps(open_)
  def opened(*args):
    try:
      return cache()(*args)
    except OSError as e:
      if e.errno not in (errno.EMFILE, errno.ENFILE):
        raise
    # No descriptor is free: other code uses more than its share. Closing the
    # cached files frees some for a second try.
    cache().cache_clear()
    return cache()(*args)

  return opened


def read(path: str, offset: int, size: int, *, of: tuple[int, str]) -> bytes:
  """Reads a part of a local file.

  Args:
    path: the file.
    offset: the position of the first byte.
    size: the number of bytes.
    of: the expected size in bytes and modification time in nanoseconds.

  Returns:
    The bytes; fewer than `size` if the file ends earlier.

  Raises:
    OSError: the file cannot be read.
    RunError: the file has another size or modification time.
  """
  file = _open(path, of)
  content = _read(file, offset, size)
  now = os.fstat(file.fileno())
  if len(content) == size and (now.st_size, str(now.st_mtime_ns)) != of:
    raise changed(path)
  return content


def changed(path: str) -> errors.RunError:
  """Returns the error for a file that changed during the run."""
  return errors.RunError(
    f'{path}: changed since this run opened it; run the same command again, or '
    'put back what was there'
  )


def _read(file: io.FileIO, offset: int, size: int) -> bytes:
  """Reads `size` bytes, or fewer if the file ends earlier."""
  content = os.pread(file.fileno(), size, offset)
  while len(content) < size:  # Linux reads at most 2 GiB in one call.
    more = os.pread(file.fileno(), size - len(content), offset + len(content))
    if not more:
      break
    content += more
  return content


@kept
def _open(path: str, of: tuple[int, str]) -> io.FileIO:
  """Opens a file without a buffer, since `_read` reads at any position."""
  del of  # It is part of the cache's key: a changed file is opened anew.
  return open(path, 'rb', buffering=0)
