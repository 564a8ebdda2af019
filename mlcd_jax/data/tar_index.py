"""Where the images of a tar lie, found by walking its headers once.

A sample is a run of members whose names agree up to the first dot of the base
name, its key: a/0001.jpg and a/0001.txt are sample a/0001. Nothing is ever
extracted to disk.
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

# Why a label is left out.
NO_NUMBER = 'label that is no number'

_VERSION = 3
_BLOCK = 512
_CHUNK = 2**20
_IMAGES = tuple(suffix.removeprefix('.') for suffix in formats.SUFFIXES)
_NUMBERS = ('offsets', 'sizes', 'caption_offsets', 'caption_sizes', 'labels')
# GNU's own kinds of members: the names in a folder, and that of the volume.
_NO_CONTENT = (b'D', b'V')
# Of unknown types the data are a file's, says POSIX.
_NO_FILE = {tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b'M', b'N'}
_COMPRESSED = {
  b'\x1f\x8b': 'gzip',
  b'BZh': 'bzip2',
  b'\xfd7zXZ': 'xz',
  b'\x28\xb5\x2f\xfd': 'zstd',
  b'\x04\x22\x4d\x18': 'lz4',
  b'PK\x03\x04': 'zip',
}


@dataclasses.dataclass(frozen=True)
class Members:
  """The member names, without dot, that hold a sample's parts.

  Attributes:
    image: beside the usual ones, such as jpg and png.
    label: beside cls, WebDataset's.
    caption: beside txt, img2dataset's.
  """

  image: str
  label: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Index:
  """The samples of one tar that have an image.

  Attributes:
    keys: [n], see `keys.spell`.
    numbers: int64 [5, n]: of each image the offset and size, of its caption
      the offset (-1: none) and size, and the label (-1: none).
    problems: reason -> names of images that cannot be used.
    left_out: reason -> how many other members were not taken.
  """

  keys: np.ndarray
  numbers: np.ndarray
  problems: dict[str, list[str]]
  left_out: dict[str, int]


@dataclasses.dataclass
class _Sample:
  """One row of an index in the making."""

  key: str
  image: tuple[int, int] | None = None
  caption: tuple[int, int] = (-1, 0)
  label: int = -1


def find(file: storage.File, members: Members, cache_dir: str) -> Index | None:
  """Reads a tar's index if it was kept and neither has changed.

  It lies beside the tar, or where that cannot be written, in `cache_dir`.
  """
  for path in _places(file, cache_dir):
    index = _read(path, _made_from(file, members))
    if index is not None:
      return index
  return None


def load(file: storage.File, members: Members, cache_dir: str) -> Index:
  """Reads a tar's index, or builds and keeps it.

  Raises:
    UserError: the tar cannot be read, or is compressed.
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
    except Exception as e:  # Every storage has errors of its own.
      reason = getattr(e, 'strerror', None) or e
  _warn_not_kept(posixpath.dirname(file.path), cache_dir, str(reason))
  return index


@functools.cache
def _warn_not_kept(folder: str, cache_dir: str, reason: str) -> None:
  """Says once for all tars of a folder that the next run indexes them anew."""
  _log.warning(
    'webdataset: the indices of the tars in %s cannot be kept there, nor in '
    'data.cache_dir=%s (%s)', folder, cache_dir, reason,
  )  # fmt: skip


def build(file: storage.File, members: Members) -> Index:
  """Walks the headers of a tar; one that is cut short gives what is whole.

  Raises:
    UserError: it is compressed, so that nothing in it can be read at random.
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
  """What the members of a tar are, added one by one.

  Attributes:
    problems: reason -> names of the images that cannot be used.
    left_out: reason -> how many members are no image, caption or label.
  """

  def __init__(self, members: Members):
    self.problems = {}
    self.left_out = collections.Counter()
    self._members = members
    self._samples = []
    self._refused = set()  # Keys of the images in `problems`.
    self._places = {}  # Of all files by name, for links to them.

  def add(self, member: tarfile.TarInfo | None, f: BinaryIO) -> bool:
    """Adds a member; False for None, which stands for a damaged tar."""
    if member is None:
      return False
    if member.isdir() or member.type in _NO_CONTENT:
      return True
    key, suffix = _split(member.name)
    part = _part(suffix.lower(), self._members)
    place, reason = self._place(member)
    if posixpath.basename(member.name).startswith('.'):
      self.left_out['hidden file'] += 1  # As macOS's ._0001.jpg.
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
    """Returns the samples with an image."""
    for sample in self._samples:
      if sample.image is None and sample.key not in self._refused:
        self.problems.setdefault('no image', []).append(sample.key)
    return [s for s in self._samples if s.image is not None]

  def _place(
    self, member: tarfile.TarInfo
  ) -> tuple[tuple[int, int] | None, str]:
    """Offset and size of a member's data, or why there is none."""
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
    """The sample that a member belongs to: the last one, or a new one."""
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
    """The class number that a file says; -1 where it says none."""
    f.seek(place[0])
    text = f.read(min(place[1], 32)).strip()
    if text.isdigit() and place[1] <= 32 and int(text) < 2**63:
      return int(text)
    if text not in (b'', b'-1'):
      self.left_out[NO_NUMBER] += 1
    return -1


def _part(suffix: str, members: Members) -> str | None:
  """What a member is to its sample."""
  if suffix in (members.image, *_IMAGES):
    return 'image'
  if suffix in (members.caption, 'txt'):
    return 'caption'
  return 'label' if suffix in (members.label, 'cls') else None


def _split(name: str) -> tuple[str, str]:
  """'./a/0.seg.png' -> ('a/0', 'seg.png')."""
  folder, base = posixpath.split(name.removeprefix('./'))
  key, _, suffix = base.partition('.')
  return posixpath.join(folder, key), suffix


def _leads_outside(name: str) -> bool:
  return name.startswith('/') or '..' in name.split('/')


def _is_whole(member: tarfile.TarInfo) -> bool:
  """Whether all of a file is stored, and not only what is around holes.

  GNU tar calls files sparse that a file system has compressed.
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
  """Yields the members of a tar, and of others appended to it by cat.

  None, as the last, stands for a tar that is damaged or cut short.
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
        tar.members.clear()  # It keeps them all.
        if tar.offset <= end or not _fits(member, file.size):
          break
        end = tar.offset
        yield member
    except OSError:
      raise
    except Exception:  # Its parsers raise whatever they stumble over.
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
    return  # What follows the end of an archive and is none is ignored.


def _fits(member: tarfile.TarInfo, length: int) -> bool:
  """Whether a member's data end before the file does."""
  size = member.size
  if not member.isreg() and member.type in tarfile.SUPPORTED_TYPES:
    size = 0  # Folders and links have no data, whatever they say.
  elif member.sparse is not None:
    size = sum(length for _, length in member.sparse)
  return size >= 0 and member.offset_data + size <= length


def _after_zeros(f: BinaryIO, position: int) -> int:
  """Where the first block that is not empty begins, or the file ends."""
  f.seek(position)
  while chunk := f.read(_CHUNK):
    zeros = len(chunk) - len(chunk.lstrip(b'\0'))
    if zeros < len(chunk):
      return position + zeros // _BLOCK * _BLOCK
    position += len(chunk)
  return position


def _check_uncompressed(f: BinaryIO, path: str) -> None:
  f.seek(0)
  begin = f.read(8)
  for magic, name in _COMPRESSED.items():
    if begin.startswith(magic):
      raise errors.UserError(
        f'data.path={path}: is compressed ({name}), and images are read at '
        'random places; unpack it to a plain tar'
      )


def _places(file: storage.File, cache_dir: str) -> list[str]:
  """Where an index may lie: beside the tar, or in the cache."""
  places = [file.path + storage.INDEX_SUFFIX]
  with contextlib.suppress(errors.UserError):
    places.append(str(cache.place(file, cache_dir, storage.INDEX_SUFFIX)))
  return places


def _made_from(file: storage.File, members: Members) -> str:
  return json.dumps(
    [_VERSION, file.size, file.stamp, *dataclasses.astuple(members)]
  )


def _read(path: str, made_from: str) -> Index | None:
  """A kept index; None where there is none that holds."""
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
  except Exception:  # Not there, cut short, or something else: build it anew.
    return None
