"""Indices of tars: the byte positions of the images, captions and labels.

The headers of a tar are read once, and nothing is extracted to disk. A sample
is a run of consecutive members with the same key. The key is the name up to the
first dot of the base name: a/0001.jpg and a/0001.txt are the sample a/0001.
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import json
import logging
import posixpath
import tarfile
from typing import BinaryIO

import numpy as np

from mlcd_jax.data import cache
from mlcd_jax.data import formats
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import storage

_log = logging.getLogger(__name__)

# The reason for a label that is left out.
NO_NUMBER = 'label that is no number'

_VERSION = 3  # Of the index; older ones are built anew.
_BLOCK = 512  # The bytes of a tar block. Headers and data begin at multiples.
_CHUNK = 2**20  # Bytes of zeros that are read at once between two tars.
_IMAGES = tuple(suffix.removeprefix('.') for suffix in formats.SUFFIXES)
_NUMBERS = ('offsets', 'sizes', 'caption_offsets', 'caption_sizes', 'labels')
# GNU tar's member types of a folder's file list and of a volume's name.
_NO_CONTENT = (b'D', b'V')
# POSIX treats members of unknown types as files, but these are not.
_NO_FILE = {tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b'M', b'N'}
_COMPRESSED = {  # First bytes of a file -> its format.
  b'\x1f\x8b': 'gzip',
  b'BZh': 'bzip2',
  b'\xfd7zXZ': 'xz',
  b'\x28\xb5\x2f\xfd': 'zstd',
  b'\x04\x22\x4d\x18': 'lz4',
  b'PK\x03\x04': 'zip',
}


@dataclasses.dataclass(frozen=True)
class Members:
  """Additional suffixes, without dot, of the members of a sample.

  Attributes:
    image: the suffix of images, besides the usual ones such as jpg and png.
    label: the suffix of class numbers, besides WebDataset's cls.
    caption: the suffix of captions, besides img2dataset's txt.
  """

  image: str
  label: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Index:
  """The n samples of one tar that have an image.

  Attributes:
    keys: the spelled keys [n].
    numbers: int64 [5, n]; the rows are the offset and size of the image, the
      offset and size of the caption, and the label. A missing caption has the
      offset -1, and a missing label is -1.
    problems: reason -> the names of unusable images, or of the tar itself.
    left_out: reason -> the number of other members that were not taken.
  """

  keys: np.ndarray
  numbers: np.ndarray
  problems: dict[str, list[str]]
  left_out: dict[str, int]


@dataclasses.dataclass
class _Sample:
  """A sample while the index is built, with the (offset, size) of its parts."""

  key: str
  image: tuple[int, int] | None = None
  caption: tuple[int, int] = (-1, 0)
  label: int = -1


def find(file: storage.File, members: Members, cache_dir: str) -> Index | None:
  """Returns the saved index of a tar; None if it is missing or out of date.

  It lies beside the tar, or in `cache_dir` if that folder cannot be written.
  """
  for path in _places(file, cache_dir):
    index = _read(path, _made_from(file, members))
    if index is not None:
      return index
  return None


def load(file: storage.File, members: Members, cache_dir: str) -> Index:
  """Returns the index of a tar, and builds and saves it if needed.

  Raises:
    UserError: the tar cannot be read, or it is compressed.
  """
  index = find(file, members, cache_dir)
  if index is not None:
    return index
  with storage.reading(file.path):
    index = build(file, members)
  content = io.BytesIO()
  np.savez(
    content,
    keys=index.keys,
    numbers=index.numbers,
    problems=np.array(json.dumps(index.problems)),
    left_out=np.array(json.dumps(index.left_out)),
    made_from=np.array(_made_from(file, members)),
    allow_pickle=False,
  )
  for path in _places(file, cache_dir):
    try:
      storage.write(path, content.getvalue())
      return index
    except Exception as e:  # Each fsspec storage raises its own errors.
      reason = getattr(e, 'strerror', None) or e
  _warn_not_kept(posixpath.dirname(file.path), cache_dir, str(reason))
  return index


@functools.cache
def _warn_not_kept(folder: str, cache_dir: str, reason: str) -> None:
  """Warns once per folder that its indices cannot be saved."""
  _log.warning(
    'webdataset: the indices of the tars in %s cannot be kept there, nor in '
    'data.cache_dir=%s (%s)', folder, cache_dir, reason,
  )  # fmt: skip


def build(file: storage.File, members: Members) -> Index:
  """Builds the index of a tar; a truncated tar gives its whole members.

  Raises:
    UserError: the tar is compressed, so it has no random access.
  """
  contents = _Contents(members)
  if not file.size:
    contents.problems['empty shard'] = [file.path]
  else:
    with storage.open_file(file.path) as f:
      whole = all(contents.add(m, f) for m in _members(f, file))
    if not whole:
      contents.problems['truncated tar'] = [file.path]
  samples = contents.finish()
  numbers = [(*s.image, *s.caption, s.label) for s in samples]
  return Index(
    keys=keys_lib.spell([s.key for s in samples]),
    numbers=np.array(numbers, np.int64).reshape(-1, len(_NUMBERS)).T.copy(),
    problems=contents.problems,
    left_out=contents.left_out,
  )


class _Contents:
  """A builder of samples, to which the members of a tar are added in order.

  It counts `problems` and `left_out`, which are those of `Index`.
  """

  def __init__(self, members: Members):
    self.problems = {}
    self.left_out = collections.Counter()
    self._members = members
    self._samples = []
    self._refused = set()  # Keys of the images in `problems`.
    self._places = {}  # Name -> (offset, size) of all files, for links.

  def add(self, member: tarfile.TarInfo | None, f: BinaryIO) -> bool:
    """Adds a member; returns False if it is None, the mark of a damaged tar."""
    if member is None:
      return False
    if member.isdir() or member.type in _NO_CONTENT:
      return True
    key, suffix = _split(member.name)
    part = _part(suffix.lower(), self._members)
    place, reason = self._place(member)
    if posixpath.basename(member.name).startswith('.'):
      self.left_out['hidden file'] += 1  # Such as ._0001.jpg of macOS.
    elif part is None:
      several = suffix.lower().endswith(tuple(f'.{x}' for x in _IMAGES))
      self.left_out['name with several dots' if several else 'other file'] += 1
    elif reason and part == 'image':
      self.problems.setdefault(reason, []).append(member.name)
      self._refused.add(key)
    elif reason:
      self.left_out[reason] += 1
    elif part == 'label':
      self._sample(key, part).label = self._label(place, f)
    else:
      setattr(self._sample(key, part), part, place)
    return True

  def finish(self) -> list[_Sample]:
    """Returns the samples with an image; notes the others as problems."""
    for sample in self._samples:
      if sample.image is None and sample.key not in self._refused:
        self.problems.setdefault('no image', []).append(sample.key)
    return [s for s in self._samples if s.image is not None]

  def _place(
    self, member: tarfile.TarInfo
  ) -> tuple[tuple[int, int] | None, str]:
    """Returns a member's (offset, size), and '' or why it cannot be used."""
    name = posixpath.normpath(member.name)
    place, reason = (member.offset_data, member.size), ''
    if member.issym() or member.islnk():
      target = member.linkname
      if member.issym():
        target = posixpath.join(posixpath.dirname(name), target)
      place = self._places.get(posixpath.normpath(target))
      reason = '' if place else 'link to no earlier file'
    elif member.type in _NO_FILE:
      reason = 'no regular file'
    elif not _is_whole(member):
      reason = 'sparse file'
    if _leads_outside(member.name):
      reason = 'unsafe name'
    if not reason:
      self._places[name] = place
    return place, reason

  def _sample(self, key: str, part: str) -> _Sample:
    """Returns the sample of a member: the last one if it fits, or a new one."""
    last = self._samples[-1] if self._samples else None
    if (
      last is None
      or last.key != key
      or (part == 'image' and last.image is not None)
    ):
      last = _Sample(key)
      self._samples.append(last)
    return last

  def _label(self, place: tuple[int, int], f: BinaryIO) -> int:
    """Reads a class number from the text of a member; -1 if it has none."""
    f.seek(place[0])
    text = f.read(min(place[1], 32)).strip()
    if text.isdigit() and place[1] <= 32 and int(text) < 2**63:
      return int(text)
    if text not in (b'', b'-1'):
      self.left_out[NO_NUMBER] += 1
    return -1


def _part(suffix: str, members: Members) -> str | None:
  """Returns the part of a sample that a suffix stands for, or None."""
  if suffix in (members.image, *_IMAGES):
    return 'image'
  if suffix in (members.caption, 'txt'):
    return 'caption'
  return 'label' if suffix in (members.label, 'cls') else None


def _split(name: str) -> tuple[str, str]:
  """Splits a name: './a/0.seg.png' -> ('a/0', 'seg.png')."""
  folder, base = posixpath.split(name.removeprefix('./'))
  key, _, suffix = base.partition('.')
  return posixpath.join(folder, key), suffix


def _leads_outside(name: str) -> bool:
  """Returns whether extracting this name could write outside the folder."""
  return name.startswith('/') or '..' in name.split('/')


def _is_whole(member: tarfile.TarInfo) -> bool:
  """Returns whether a member is stored without holes.

  GNU tar marks files as sparse if their file system compresses them.
  """
  if member.sparse is None:
    return True
  end = 0
  for offset, length in member.sparse:
    if length and offset != end:
      return False
    end += length
  return end == member.size


def _members(
  f: BinaryIO, file: storage.File
) -> Iterator[tarfile.TarInfo | None]:
  """Yields the members of a tar and of further tars appended by `cat`.

  If the tar is damaged or truncated, the last value is None.
  """
  start = 0
  while start < file.size:
    f.seek(start)
    tar = None
    try:
      tar = tarfile.TarFile(
        fileobj=f, encoding='utf-8', errors='backslashreplace'
      )
      end = start
      while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile keeps all, which takes much memory.
        if tar.offset <= end or not _fits(member, file.size):
          break
        end = tar.offset
        yield member
    except OSError:
      raise
    except Exception:  # tarfile raises many types on damaged headers.
      if tar is None:
        _check_uncompressed(f, file.path)
      yield None
      return
    f.seek(end)
    if member is None and f.read(_BLOCK) == bytes(_BLOCK):
      start = _after_zeros(f, end)
      continue
    if member is not None or end > start or not start:
      yield None
    return  # Other data after the end of an archive is ignored.


def _fits(member: tarfile.TarInfo, length: int) -> bool:
  """Returns whether a member's data ends within a tar of `length` bytes."""
  size = member.size
  if not member.isreg() and member.type in tarfile.SUPPORTED_TYPES:
    size = 0  # Folders and links have no data, whatever size they state.
  elif member.sparse is not None:
    size = sum(length for _, length in member.sparse)
  return size >= 0 and member.offset_data + size <= length


def _after_zeros(f: BinaryIO, position: int) -> int:
  """Returns the position of the next non-zero block, or of the file's end."""
  f.seek(position)
  while chunk := f.read(_CHUNK):
    zeros = len(chunk) - len(chunk.lstrip(b'\0'))
    if zeros < len(chunk):
      return position + zeros // _BLOCK * _BLOCK
    position += len(chunk)
  return position


def _check_uncompressed(f: BinaryIO, path: str) -> None:
  """Raises a UserError if a file begins as a compressed file."""
  f.seek(0)
  begin = f.read(8)
  for magic, name in _COMPRESSED.items():
    if begin.startswith(magic):
      raise errors.UserError(
        f'data.path={path}: is compressed ({name}), and images are read at '
        'random places; unpack it to a plain tar'
      )


def _places(file: storage.File, cache_dir: str) -> list[str]:
  """Returns the possible paths of an index, in order of preference."""
  places = [file.path + storage.INDEX_SUFFIX]
  with contextlib.suppress(errors.UserError):
    places.append(str(cache.place(file, cache_dir, storage.INDEX_SUFFIX)))
  return places


def _made_from(file: storage.File, members: Members) -> str:
  """Returns a text that differs if an index is out of date."""
  return json.dumps(
    [_VERSION, file.size, file.stamp, *dataclasses.astuple(members)]
  )


def _read(path: str, made_from: str) -> Index | None:
  """Reads a saved index; None if it is missing, damaged or out of date."""
  try:
    with np.load(io.BytesIO(storage.read(path)), allow_pickle=False) as kept:
      if str(kept['made_from']) != made_from:
        return None
      return Index(
        keys=kept['keys'],
        numbers=kept['numbers'],
        problems=json.loads(str(kept['problems'])),
        left_out=json.loads(str(kept['left_out'])),
      )
  except Exception:  # Whatever is wrong with a saved index, it is built anew.
    return None
