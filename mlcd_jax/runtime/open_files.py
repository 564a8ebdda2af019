"""Files that many threads read, kept open and never more than are allowed."""

from collections.abc import Callable
import errno
import functools
import io
import os
import resource
from typing import TypeVar

from mlcd_jax.runtime import errors

T = TypeVar('T')

# A quarter of what the process may open, since libraries open files too.
_SHARE = 4
_MOST = 8_192


def kept(open_: Callable[..., T]) -> Callable[..., T]:
  """Makes a function keep what it opened last, within the process's limit.

  What it returns must be held as long as it is used and close itself when
  nobody holds it: the cache may drop it, or another thread open it once more,
  at any time.
  """

  @functools.cache
  def cache():  # Made late: the limit is raised when a command starts.
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
    cache().cache_clear()  # Others need more than was left to them.
    return cache()(*args)

  return opened


def read(path: str, offset: int, size: int, *, of: tuple[int, str]) -> bytes:
  """Reads a part of a local file; fewer bytes where it ends.

  Args:
    path: of the file.
    offset: of the first byte.
    size: how many.
    of: its size and time of change in nanoseconds, as they must be.

  Raises:
    OSError: it cannot be read.
    RunError: it is another one by now.
  """
  file = _open(path, of)
  content = _read(file, offset, size)
  now = os.fstat(file.fileno())
  if len(content) == size and (now.st_size, str(now.st_mtime_ns)) != of:
    raise changed(path)
  return content


def changed(path: str) -> errors.RunError:
  """Returns the error of a file that another one has taken the place of."""
  return errors.RunError(
    f'{path}: changed since this run opened it; run the same command again, or '
    'put back what was there'
  )


def _read(file: io.FileIO, offset: int, size: int) -> bytes:
  content = os.pread(file.fileno(), size, offset)
  while len(content) < size:  # Linux reads no more than 2 GiB at once.
    more = os.pread(file.fileno(), size - len(content), offset + len(content))
    if not more:
      break
    content += more
  return content


@kept
def _open(path: str, of: tuple[int, str]) -> io.FileIO:
  del of  # Another file of that path is opened anew.
  return open(path, 'rb', buffering=0)
