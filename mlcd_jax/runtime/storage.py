"""Files by path, glob or brace range, local or behind any fsspec URL."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import dataclasses
import errno
import functools
import glob
import itertools
import logging
import os
import pathlib
import posixpath
import re
import stat as stat_lib
from typing import Any
from typing import BinaryIO

import fsspec

from mlcd_jax.runtime import entries
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import open_files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems

_log = logging.getLogger(__name__)

_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_MODIFIED = ('mtime', 'LastModified', 'updated', 'last_modified', 'created')

# Suffix of a tar's index, which lies beside the tar.
INDEX_SUFFIX = '.index.npz'

# Values of OSError.errno that concern one file and not its storage. A single
# missing or unreadable file counts as bad; a failing storage ends the run.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_UNREADABLE = (
  errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENXIO,
  errno.ENODEV, errno.ENAMETOOLONG, errno.EBADMSG,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class File:
  """A file with the size and time it had when it was found.

  Attributes:
    path: the local path or URL.
    size: the size in bytes.
    stamp: a text that changes with the file, such as its modification time; ''
      if the storage gives none.
  """

  path: str
  size: int
  stamp: str


def is_url(path: str) -> bool:
  """Returns whether a path is a URL, which fsspec reads."""
  return '://' in path


class Unreadable(errors.RunError):
  """An error for a file that cannot be read although its storage works.

  Attributes:
    missing: True if the file does not exist.
  """

  def __init__(self, text: str, *, missing: bool):
    super().__init__(text)
    self.missing = missing


def find(pattern: str, suffixes: Sequence[str]) -> list[File]:
  """Returns the files that a `data.path` stands for, sorted by path.

  A folder gives its files with one of the suffixes. So does a glob if it
  matches such files; otherwise it gives all its files. Hidden files, system
  files and tar indices are always left out.

  Args:
    pattern: a file, a folder or a glob; {00000..00099} stands for a range. A
      path that exists is taken literally, even with brackets or braces.
    suffixes: the suffixes in lower case, with the dot.

  Raises:
    UserError: there are no files, a file of a range is missing, or a link is
      broken.
  """
  if not pattern:
    raise errors.UserError('data.path: name the files, such as data/*.tar')
  expanded = paths.expand(pattern, 'data.path')
  found = []
  exact = []
  for path in [expanded] if _is_there(expanded) else _expand_ranges(expanded):
    if glob.has_magic(path) and not _is_there(path):
      found += _glob(path, suffixes)
    else:
      exact.append(path)
  for path, file in zip(exact, _stat_all(exact)):
    found += [file] if file else _listed(path, suffixes)
  if not found:
    raise errors.UserError(
      f'data.path={pattern}: no such file; it may be a path, a folder with '
      f'{" or ".join(suffixes)} files, a glob, or a range such as '
      '{00000..00099}'
    )
  return sorted(set(found), key=lambda f: f.path)


def walk(
  root: str,
  field: str = 'data.path',
  found: problems.Problems | None = None,
) -> list[str]:
  """Returns the sorted paths of all files below a folder, relative to it.

  Hidden and system entries are left out. `entries.walk` follows local links.

  Args:
    root: a local folder or a URL.
    field: the config field that an error names.
    found: counts the subfolders that cannot be listed. Without it, such a
      folder raises an error.

  Raises:
    UserError: the folder does not exist or cannot be listed.
  """
  with reading(root, field):
    if is_url(root):
      filesystem, path = _filesystem(root)
      if not filesystem.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, 'no such folder')
      path = path.rstrip('/') + '/'
      names = [name.removeprefix(path) for name in filesystem.find(path)]
      return sorted(name for name in names if not _has_system_part(name))
    if not os.path.isdir(root):
      raise NotADirectoryError(errno.ENOTDIR, 'no such folder')

  def unlisted(folder, e):
    if found is None or os.path.samefile(folder, root):
      with reading(folder, field):
        raise e
    found.add(folder, 'unreadable folder')

  return entries.walk(root, unlisted)


def folders(pattern: str) -> list[str]:
  """Returns the folders that match a glob, sorted by path."""
  if is_url(pattern):
    with reading(pattern):
      filesystem, path = _filesystem(pattern)
      infos = filesystem.glob(path, detail=True)
    names = [
      filesystem.unstrip_protocol(name)
      for name, info in infos.items()
      if info['type'] == 'directory'
    ]
  else:
    names = [p for p in glob.glob(pattern) if os.path.isdir(p)]
  return sorted(name for name in names if not _has_system_part(name, pattern))


def read(path: str | File, offset: int = 0, size: int | None = None) -> bytes:
  """Reads a file or a part of it.

  Args:
    path: the local path or URL, or the `File` that was found. A part of a local
      `File` is checked to be unchanged.
    offset: the position of the first byte.
    size: the number of bytes, or None to read to the end.

  Raises:
    Unreadable: the file cannot be read.
    RunError: its storage cannot be read, or a `File` changed or is too short.
  """
  file = path if isinstance(path, File) else None
  path = file.path if file else path
  try:
    if is_url(path):
      filesystem, name = _filesystem(path)
      end = None if size is None else offset + size
      content = filesystem.cat_file(name, start=offset or None, end=end)
    elif file and size is not None:
      content = open_files.read(path, offset, size, of=(file.size, file.stamp))
    else:
      with open(path, 'rb', buffering=0) as f:
        f.seek(offset)
        content = f.read() if size is None else f.read(size)
  except OSError as e:
    text = f'{path}: cannot be read ({e})'
    if e.errno in _MISSING or isinstance(e, FileNotFoundError):
      raise Unreadable(text, missing=True) from e
    if e.errno in _UNREADABLE or isinstance(e, PermissionError):
      raise Unreadable(text, missing=False) from e
    raise errors.RunError(text) from e
  if file and size is not None and len(content) < size:
    raise errors.RunError(f'{path}: shorter than it was when it was opened')
  return content


def open_file(path: str) -> BinaryIO:
  """Opens a local file or a URL for reading; raises OSError."""
  if not is_url(path):
    return open(path, 'rb')
  filesystem, name = _filesystem(path)
  return filesystem.open(name, 'rb')


def write(path: str, content: bytes) -> None:
  """Writes a whole file; passes on the errors of its storage."""
  if is_url(path):
    filesystem, name = _filesystem(path)
    filesystem.pipe_file(name, content)
    return
  with files.atomic(pathlib.Path(path)) as temporary:
    temporary.write_bytes(content)


@contextlib.contextmanager
def reading(path: str, field: str = 'data.path') -> Iterator[None]:
  """Turns errors of the block into a UserError that names the path."""
  try:
    yield
  except (OSError, ImportError, ValueError) as e:
    reason = getattr(e, 'strerror', None) or e or type(e).__name__
    raise errors.UserError(f'{field}={path}: cannot be read ({reason})') from e


def each(path: str, parts: Iterable[Any]) -> Iterator[Any]:
  """Yields `parts`; turns errors of reading them into a UserError.

  Args:
    path: the file that the error names.
    parts: a lazy reader of the file.
  """
  with reading(path):
    yield from parts


def _expand_ranges(pattern: str) -> list[str]:
  """Expands ranges: 'a{08..10}' -> ['a08', 'a09', 'a10']."""
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


def _is_there(path: str) -> bool:
  """Returns whether a path that looks like a glob or range exists literally."""
  if not glob.has_magic(path) and not _RANGE.search(path):
    return False
  if not is_url(path):
    return os.path.lexists(path)
  with reading(path):
    filesystem, name = _filesystem(path)
    return filesystem.exists(name)


def _glob(pattern: str, suffixes: Sequence[str]) -> list[File]:
  """Returns the files that match a glob.

  Leading folders that exist are taken literally, even with brackets.
  """
  parts = pattern.split('/')
  literal = ''
  for i in range(1, len(parts)):
    folder = '/'.join(parts[:i])
    if glob.has_magic(folder) and not _is_there(folder):
      break
    literal = folder
  rest = pattern.removeprefix(literal)
  if is_url(pattern):
    with reading(pattern):
      filesystem, path = _filesystem(glob.escape(literal) + rest)
      infos = filesystem.glob(path, detail=True)
    return _remote_files(filesystem, infos, suffixes, pattern)
  names = glob.glob(glob.escape(literal) + rest)
  return _local_files(names, suffixes, pattern)


def _listed(folder: str, suffixes: Sequence[str]) -> list[File]:
  """Returns the files of a folder that have one of the suffixes."""
  folder = folder.rstrip('/')
  with reading(folder):
    if is_url(folder):
      filesystem, path = _filesystem(folder)
      infos = {info['name']: info for info in filesystem.ls(path, detail=True)}
      return _remote_files(filesystem, infos, suffixes)
    names = [f'{folder}/{name}' for name in os.listdir(folder or '/')]
  return _local_files(names, suffixes)


def _local_files(
  names: Sequence[str], suffixes: Sequence[str], pattern: str = ''
) -> list[File]:
  return list(filter(None, _stat_all(_chosen(names, suffixes, pattern))))


def _remote_files(
  filesystem,
  infos: Mapping[str, dict[str, Any]],
  suffixes: Sequence[str],
  pattern: str = '',
) -> list[File]:
  names = [name for name, info in infos.items() if info['type'] == 'file']
  return [
    _remote_file(filesystem, name, infos[name])
    for name in _chosen(names, suffixes, pattern)
  ]


def _chosen(
  names: Sequence[str], suffixes: Sequence[str], pattern: str
) -> list[str]:
  """Returns the paths of a listing that are data; see `find`.

  Args:
    names: the paths.
    suffixes: the suffixes of data files.
    pattern: the glob that gave the paths, or '' for a folder.
  """
  names = [
    name
    for name in names
    if not _has_system_part(name, pattern or posixpath.dirname(name))
    and not name.endswith(INDEX_SUFFIX)
  ]
  chosen = [n for n in names if n.lower().endswith(tuple(suffixes))]
  if not pattern or chosen:
    if pattern and len(chosen) < len(names):
      _log.info(
        'data: %d files of %s are no %s and are left out',
        len(names) - len(chosen), pattern, ' or '.join(suffixes),
      )  # fmt: skip
    return chosen
  return names


def _has_system_part(path: str, given: str = '') -> bool:
  """Returns whether a path has a system entry that the user did not name."""
  return any(
    map(entries.is_system, set(path.split('/')) - set(given.split('/')))
  )


def stat(path: str, field: str = 'data.path') -> File | None:
  """Returns the file, or None for a folder; raises UserError if missing."""
  if is_url(path):
    with reading(path, field):
      filesystem, name = _filesystem(path)
      info = filesystem.info(name)
      if info['type'] == 'directory':
        return None
      return _remote_file(filesystem, name, info)
  with reading(path, field):
    try:
      found = os.stat(path)
    except FileNotFoundError as e:
      if os.path.islink(path):
        e.strerror = f'a link to {os.readlink(path)}, which is not there'
      raise
  if stat_lib.S_ISDIR(found.st_mode):
    return None
  return File(path, found.st_size, str(found.st_mtime_ns))


def _stat_all(names: Sequence[str]) -> list[File | None]:
  """Returns `stat` of each path; 16 at a time, since storage may be remote."""
  with futures.ThreadPoolExecutor(16) as pool:
    return list(pool.map(stat, names))


def _remote_file(filesystem, name: str, info: dict[str, Any]) -> File:
  """Makes a `File` from what fsspec lists; storages name the time variously."""
  stamp = next((str(info[k]) for k in _MODIFIED if info.get(k)), '')
  return File(filesystem.unstrip_protocol(name), info['size'] or 0, stamp)


@functools.lru_cache(4_096)
def _filesystem(path: str):
  """Returns the fsspec file system of a URL and the path in it."""
  return fsspec.core.url_to_fs(path)
