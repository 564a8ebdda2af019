"""Where the images of a tar lie, found by walking its headers once.

A sample is a run of members whose names agree up to the first dot of the base
name, its key: a/0001.jpg and a/0001.txt are sample a/0001. Nothing is ever
extracted to disk.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import json
import logging
import posixpath
from typing import BinaryIO

import numpy as np

from mlcd_jax import errors
from mlcd_jax.data import cache
from mlcd_jax.data import formats
from mlcd_jax.data import storage

_log = logging.getLogger(__name__)

_VERSION = 1
_BLOCK = 512
_IMAGES = tuple(suffix.removeprefix('.') for suffix in formats.SUFFIXES)
_NUMBERS = ('offsets', 'sizes', 'caption_offsets', 'caption_sizes', 'labels')


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
    keys: UTF-8 bytes [n].
    numbers: int64 [5, n]: of each image the offset and size, of its caption
      the offset (-1: none) and size, and the label (-1: none).
    problems: reason -> names of what was left out.
  """

  keys: np.ndarray
  numbers: np.ndarray
  problems: dict[str, list[str]]


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
    UserError: the tar cannot be read.
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
  """Walks the headers of a tar; one that is cut short gives what is whole."""
  problems = {}
  if not file.size:
    problems['empty shard'] = [file.path]
  samples = []
  with storage.open_file(file.path) as f:
    whole = True
    for name, offset, size in _members(f, file.size):
      if name is None:
        whole = False
        break
      key, suffix = _split(name)
      part = _part(suffix.lower(), members)
      if part and _leads_outside(name):
        if part == 'image':
          problems.setdefault('unsafe name', []).append(name)
      elif part:
        _add(samples, key, part, (offset, size), f)
  if not whole:
    problems['truncated tar'] = [file.path]
  for sample in samples:
    if sample.image is None:
      problems.setdefault('no image', []).append(sample.key)
  samples = [s for s in samples if s.image is not None]
  numbers = [(*s.image, *s.caption, s.label) for s in samples]
  return Index(
    keys=np.array([s.key.encode() for s in samples], np.bytes_),
    numbers=np.array(numbers, np.int64).reshape(-1, len(_NUMBERS)).T.copy(),
    problems=problems,
  )


def _part(suffix: str, members: Members) -> str | None:
  """What a member is to its sample."""
  if suffix in (members.image, *_IMAGES):
    return 'image'
  if suffix in (members.caption, 'txt'):
    return 'caption'
  return 'label' if suffix in (members.label, 'cls') else None


def _add(
  samples: list[_Sample],
  key: str,
  part: str,
  place: tuple[int, int],
  f: BinaryIO,
) -> None:
  """Adds a member to the last sample, or begins one."""
  if (
    not samples
    or samples[-1].key != key
    or (part == 'image' and samples[-1].image is not None)
  ):
    samples.append(_Sample(key))
  sample = samples[-1]
  if part == 'image':
    sample.image = place
  elif part == 'caption':
    sample.caption = place
  else:
    f.seek(place[0])
    digits = f.read(min(place[1], 10)).strip()
    sample.label = int(digits) if digits.isdigit() else -1


def _split(name: str) -> tuple[str, str]:
  """'./a/0.seg.png' -> ('a/0', 'seg.png')."""
  folder, base = posixpath.split(name.removeprefix('./'))
  key, _, suffix = base.partition('.')
  return posixpath.join(folder, key), suffix


def _leads_outside(name: str) -> bool:
  return name.startswith('/') or '..' in name.split('/')


def _members(f: BinaryIO, length: int) -> Iterator[tuple[str | None, int, int]]:
  """Yields (name, offset, size) of regular files; name None: cut short.

  Reads ustar, GNU and pax, of their extensions long names and large sizes.
  """
  position = 0
  long_name, large_size = None, b''
  while True:
    f.seek(position)
    header = f.read(_BLOCK)
    if length and header == bytes(_BLOCK):
      return  # The end of the archive.
    size = _size(header)
    data = position + _BLOCK
    if size is None or data + size > length:
      if length:
        yield None, 0, 0
      return
    kind = header[156:157]
    if kind == b'L':
      long_name = f.read(size).rstrip(b'\0')
    elif kind == b'x':
      fields = _pax(f.read(size))
      long_name = fields.get(b'path', long_name)
      large_size = fields.get(b'size', b'')
    elif kind not in b'gK':
      if large_size.isdigit():
        size = int(large_size)
        if data + size > length:
          yield None, 0, 0
          return
      if kind in b'07\0':
        name = long_name if long_name is not None else _name(header)
        base = name.rpartition(b'/')[2]
        if not base.startswith(b'.'):  # As macOS's ._0001.jpg.
          yield name.decode('utf-8', 'replace'), data, size
      else:
        size = 0  # Folders and links have no data.
      long_name, large_size = None, b''
    position = data + -(-size // _BLOCK) * _BLOCK


def _size(header: bytes) -> int | None:
  """The member's size; None where this is no header."""
  if len(header) < _BLOCK:
    return None
  try:
    stored = int(header[148:156].strip(b' \0'), 8)
    if stored != sum(header[:148]) + 8 * ord(' ') + sum(header[156:]):
      return None
    if header[124] & 0x80:  # GNU: binary, for 8 GiB and more.
      return int.from_bytes(header[125:136], 'big')
    return max(0, int(header[124:136].strip(b' \0') or b'0', 8))
  except ValueError:
    return None


def _name(header: bytes) -> bytes:
  name = header[:100].rstrip(b'\0')
  if header[257:263] == b'ustar\0' and header[345]:
    name = header[345:500].rstrip(b'\0') + b'/' + name
  return name


def _pax(records: bytes) -> dict[bytes, bytes]:
  """Reads records, each of them "length key=value" and a newline."""
  fields = {}
  while records:
    length, _, _ = records.partition(b' ')
    if not length.isdigit() or not int(length):
      break
    record, records = records[: int(length)], records[int(length) :]
    key, _, value = record[len(length) + 1 : -1].partition(b'=')
    fields[key] = value
  return fields


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
      )
  except Exception:  # Not there, cut short, or something else: build it anew.
    return None
