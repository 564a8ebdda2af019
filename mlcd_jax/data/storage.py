"""Files by path, glob or brace range, local or behind any fsspec URL."""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import io
import itertools
import os
import pathlib
import re
import shutil
from typing import Any
from typing import BinaryIO

import fsspec

from mlcd_jax import errors
from mlcd_jax import files

_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_MODIFIED = ('mtime', 'LastModified', 'updated', 'last_modified', 'created')


@dataclasses.dataclass(frozen=True)
class File:
  """A file as it was found.

  Attributes:
    path: local path or URL.
    size: bytes.
    stamp: text that is another one once the file is.
  """

  path: str
  size: int
  stamp: str


def is_url(path: str) -> bool:
  """Whether fsspec has to read it."""
  return '://' in path


def find(pattern: str, suffixes: Sequence[str]) -> list[File]:
  """Returns the files a `data.path` stands for, in order of their names.

  Args:
    pattern: a path, glob or folder; {00000..00099} stands for a range.
    suffixes: of the files taken from a folder, in lower case with the dot.

  Raises:
    UserError: nothing is there, or not all of a range.
  """
  if not pattern:
    raise errors.UserError('data.path: name the files, such as data/*.tar')
  found = []
  exact = []
  for path in _expand_ranges(pattern):
    if glob.has_magic(path):
      found += _glob(path)
    else:
      exact.append(path)
  with futures.ThreadPoolExecutor(16) as pool:
    for path, file in zip(exact, pool.map(stat, exact)):
      if file is None:
        found += [
          f
          for f in _glob(f'{path.rstrip("/")}/*')
          if f.path.lower().endswith(tuple(suffixes))
        ]
      else:
        found.append(file)
  if not found:
    raise errors.UserError(
      f'data.path={pattern}: no such file; it may be a path, a folder with '
      f'{" or ".join(suffixes)} files, a glob, or a range such as '
      '{00000..00099}'
    )
  return sorted(set(found), key=lambda f: f.path)


def walk(root: str, field: str = 'data.path') -> list[str]:
  """Returns the paths below a folder, relative to it, in order.

  Args:
    root: the folder.
    field: what to call it in errors.

  Raises:
    UserError: there is no such folder.
  """
  with reading(root, field):
    if is_url(root):
      filesystem, path = _filesystem(root)
      if not filesystem.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, 'no such folder')
      path = path.rstrip('/') + '/'
      return sorted(name.removeprefix(path) for name in filesystem.find(path))
    if not os.path.isdir(root):
      raise NotADirectoryError(errno.ENOTDIR, 'no such folder')
  return sorted(
    os.path.relpath(os.path.join(folder, name), root).replace(os.sep, '/')
    for folder, _, names in os.walk(root, followlinks=True)
    for name in names
  )


def folders(pattern: str) -> list[str]:
  """Returns the folders a glob stands for, in order of their names."""
  if is_url(pattern):
    with reading(pattern):
      filesystem, path = _filesystem(pattern)
      infos = filesystem.glob(path, detail=True)
    return sorted(
      filesystem.unstrip_protocol(name)
      for name, info in infos.items()
      if info['type'] == 'directory'
    )
  return sorted(p for p in glob.glob(pattern) if os.path.isdir(p))


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
  """Reads some bytes of a file; fewer where it is shorter.

  Raises:
    RunError: the file or its storage cannot be read.
  """
  try:
    if is_url(path):
      filesystem, name = _filesystem(path)
      end = None if size is None else offset + size
      return filesystem.cat_file(name, start=offset, end=end)
    if size is None:
      return pathlib.Path(path).read_bytes()
    return os.pread(_open_shard(path).fileno(), size, offset)
  except OSError as e:
    raise errors.RunError(f'{path}: cannot be read ({e})') from e


def open_file(path: str) -> BinaryIO:
  """Opens a file for reading from begin to end; raises OSError."""
  if not is_url(path):
    return open(path, 'rb')
  filesystem, name = _filesystem(path)
  return filesystem.open(name, 'rb')


def write(path: str, content: bytes) -> None:
  """Writes a whole file; raises whatever its storage raises."""
  if is_url(path):
    filesystem, name = _filesystem(path)
    filesystem.pipe_file(name, content)
    return
  with files.atomic(pathlib.Path(path)) as temporary:
    temporary.write_bytes(content)


@contextlib.contextmanager
def reading(path: str, field: str = 'data.path') -> Iterator[None]:
  """Turns what can go wrong with a path into a UserError that names it."""
  try:
    yield
  except (OSError, ImportError, ValueError) as e:
    reason = getattr(e, 'strerror', None) or e or type(e).__name__
    raise errors.UserError(f'{field}={path}: cannot be read ({reason})') from e


def cached(file: File, cache_dir: str, suffix: str) -> pathlib.Path:
  """The place of what is made of a file, another one once it changes.

  Args:
    file: local or remote.
    cache_dir: `data.cache_dir`; '' = mlcd_jax in the user's cache folder.
    suffix: tells apart what is made of it.
  """
  folder = pathlib.Path(
    cache_dir
    or pathlib.Path(
      os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache',
      'mlcd_jax',
    )
  ).expanduser()
  path = file.path if is_url(file.path) else os.path.abspath(file.path)
  identity = f'{path} {file.size} {file.stamp}'
  digest = hashlib.sha256(identity.encode('utf-8', 'replace')).hexdigest()
  return folder / f'{digest[:32]}{suffix}'


def local_copy(file: File, cache_dir: str) -> str:
  """Returns a path that can be opened without fsspec, downloaded if need be."""
  if not is_url(file.path):
    return file.path
  copy = cached(file, cache_dir, pathlib.PurePosixPath(file.path).suffix)
  if not copy.exists():
    with reading(file.path), files.atomic(copy) as temporary:
      with open_file(file.path) as source, open(temporary, 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 24)
  return str(copy)


def _expand_ranges(pattern: str) -> list[str]:
  """'a{08..10}' -> ['a08', 'a09', 'a10']."""
  parts = _RANGE.split(pattern)  # Text, low, high, text, low, high, text.
  ranges = [
    [f'{i:0{len(low)}d}' for i in range(int(low), int(high) + 1)]
    for low, high in zip(parts[1::3], parts[2::3])
  ]
  texts = parts[::3]
  return [
    texts[0] + ''.join(n + text for n, text in zip(numbers, texts[1:]))
    for numbers in itertools.product(*ranges)
  ]


def _glob(pattern: str) -> list[File]:
  if is_url(pattern):
    with reading(pattern):
      filesystem, path = _filesystem(pattern)
      infos = filesystem.glob(path, detail=True)
    return [
      _remote_file(filesystem, name, info)
      for name, info in infos.items()
      if info['type'] == 'file'
    ]
  return [_local_file(p) for p in glob.glob(pattern) if os.path.isfile(p)]


def stat(path: str, field: str = 'data.path') -> File | None:
  """The file, or None for a folder; raises UserError where neither is."""
  if is_url(path):
    with reading(path, field):
      filesystem, name = _filesystem(path)
      info = filesystem.info(name)
      if info['type'] == 'directory':
        return None
      return _remote_file(filesystem, name, info)
  with reading(path, field):
    os.stat(path)
  return None if os.path.isdir(path) else _local_file(path)


def _local_file(path: str) -> File:
  stat = os.stat(path)
  return File(path, stat.st_size, str(stat.st_mtime_ns))


def _remote_file(filesystem, name: str, info: dict[str, Any]) -> File:
  stamp = next((str(info[k]) for k in _MODIFIED if info.get(k)), '')
  return File(filesystem.unstrip_protocol(name), info['size'] or 0, stamp)


@functools.lru_cache(4_096)
def _filesystem(path: str):
  return fsspec.core.url_to_fs(path)


# Files leave the cache while other threads may read them: they are closed
# when the last reference goes, not before.
@functools.lru_cache(512)
def _open_shard(path: str) -> io.FileIO:
  return open(path, 'rb', buffering=0)
