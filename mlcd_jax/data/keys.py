"""How the keys of images are spelled: in one way, whoever wrote them.

Sources spell the keys of their records and readers of embeddings those of the
rows, so that the two are compared byte by byte.
"""

from collections.abc import Sequence
import hashlib
import logging
import os
import re
from typing import Any
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_log = logging.getLogger(__name__)

# A key may be as long as a file's name on most disks. One longer key would
# widen the array of all keys: 100 kB times every image.
MAX_BYTES = 255

# Control characters, and the two that end a line in Unicode: keys are written
# one a line.
_CONTROL = '[\x00-\x1f\x7f-\x9f\u2028\u2029]'

_SHARD = re.compile(r'\.(tar|parquet|array_record|arrayrecord)$')

# Bytes looked at, and keys laid out, at a time.
_CHUNK = 1 << 26
_CHUNK_KEYS = 1 << 20


def spell(keys: Any) -> np.ndarray:
  r"""Returns keys as UTF-8 bytes [N]; none is b''.

  Taken off is `./` at the beginning. Text is in Unicode's form NFC. Bytes that
  are no UTF-8 and control characters are written as `\xe9`. Of more than
  MAX_BYTES the first are kept, with a digest of all.

  Args:
    keys: text, bytes or integers, as a list or an array of NumPy or Arrow.

  Raises:
    ValueError: they are something else.
  """
  column = as_bytes(keys).fill_null(b'')
  if pc.any(pc.starts_with(column, './')).as_py():
    column = pc.replace_substring_regex(
      column, pattern=r'\A(\./+)+', replacement=''
    )
  if not _is_ascii(column):
    odd = pc.match_substring_regex(column, r'[^\x20-\x7e]')
    column = pc.replace_with_mask(column, odd, _composed(column.filter(odd)))
  if (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_BYTES:
    odd = pc.greater(pc.binary_length(column), MAX_BYTES)
    column = pc.replace_with_mask(
      column, odd, _each(_shortened, column.filter(odd))
    )
  return fixed_width(column)


def as_bytes(keys: Any) -> pa.LargeBinaryArray:
  """Returns text, bytes or integers as bytes; what is null stays null.

  Raises:
    ValueError: they are something else.
  """
  if not isinstance(keys, (pa.Array, pa.ChunkedArray)):
    if isinstance(keys, np.ndarray) and keys.dtype.kind == 'S':
      return pa.array(keys, pa.large_binary())
    keys = [_encoded(key) if isinstance(key, str) else key for key in keys]
    keys = pa.array(keys, pa.large_binary() if not keys else None)
  if isinstance(keys, pa.ChunkedArray):
    chunks = [as_bytes(chunk) for chunk in keys.chunks]
    return pa.concat_arrays(chunks or [pa.array([], pa.large_binary())])
  if isinstance(keys, pa.ExtensionArray):
    keys = keys.storage
  if pa.types.is_dictionary(keys.type):
    keys = keys.dictionary_decode()
  kind = keys.type
  try:
    if pa.types.is_floating(kind):  # Integers and nulls, as pandas has them.
      keys = keys.cast(pa.int64())
    if pa.types.is_integer(keys.type):
      keys = keys.cast(pa.string())
    return keys.cast(pa.large_binary())
  except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as e:
    raise ValueError(
      f'keys of type {kind}; they are text, bytes or integers'
    ) from e


def fixed_width(column: pa.Array) -> np.ndarray:
  """Returns text or bytes as an array of bytes [N], as wide as the longest."""
  column = column.cast(pa.large_binary())
  lengths = pc.binary_length(column).to_numpy(zero_copy_only=False)
  width = max(1, int(lengths.max(initial=0)))
  out = np.zeros((len(column), width), np.uint8)
  data, first = _data(column), 0
  for start in range(0, len(column), _CHUNK_KEYS):
    part = lengths[start : start + _CHUNK_KEYS]
    last = first + int(part.sum())
    filled = np.arange(width)[None] < part[:, None]
    out[start : start + _CHUNK_KEYS][filled] = data[first:last]
    first = last
  return out.reshape(-1).view(f'S{width}')


def numbered(name: str, count: int) -> np.ndarray:
  """Returns the spelled keys name-000000000, name-000000001 and so on."""
  if not count:
    return np.zeros(0, 'S1')
  width = max(9, len(str(count)))
  numbers = np.strings.zfill(np.arange(count).astype(f'S{width}'), 9)
  return spell(np.strings.add(_encoded(f'{name}-'), numbers))


def across(shards: Sequence[np.ndarray], paths: Sequence[str]) -> np.ndarray:
  """Returns the keys of all shards in order, told apart.

  A key that several shards have, such as 000000000 of two runs of img2dataset
  or the same file name in two folders, gets the shard's path before it, below
  the folder that all have in common and without suffix: a/00000/000000000.
  All others stay as they are.

  Args:
    shards: spelled keys of each.
    paths: of the shards.
  """
  keys = np.concatenate(shards)
  places = _overlapping(shards)
  number = np.repeat(np.arange(len(shards)), [len(s) for s in shards])
  if places:
    rows = np.flatnonzero(np.isin(number, places))
    rows = rows[_in_several(keys[rows], number[rows])]
  if not places or not len(rows):
    return keys
  names = spell(_below_common_folder(paths))
  names = np.strings.add(names, b'/')
  told_apart = spell(np.strings.add(names[number[rows]], keys[rows]))
  _log.warning(
    'data: %d images have a key that another file has too, such as %s; the '
    "file's name is put before it, as in %s",
    len(rows),
    text(keys[rows[0]]),
    text(told_apart[0]),
  )
  keys = keys.astype(np.result_type(keys, told_apart))
  keys[rows] = told_apart
  return keys


def groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows [N] in order of their keys, and where a new key begins."""
  order = np.argsort(keys, kind='stable')
  sorted_keys = keys[order]
  begins = np.ones(len(keys), bool)
  begins[1:] = sorted_keys[1:] != sorted_keys[:-1]
  return order, np.flatnonzero(begins)


def is_shard(path: str) -> bool:
  """Returns whether a path is that of a file with many images."""
  return bool(_SHARD.search(path))


def text(key: bytes) -> str:
  """Returns a spelled key as text."""
  return key.decode('utf-8', 'replace')


def _encoded(key: str) -> bytes:
  """UTF-8; the bytes of file names that are none, as the system gave them."""
  try:
    return key.encode('utf-8', 'surrogateescape')
  except UnicodeEncodeError:  # Half of a pair of surrogates.
    return key.encode('utf-8', 'surrogatepass')


def _data(column: pa.LargeBinaryArray) -> np.ndarray:
  """All bytes of a column in a row."""
  _, offsets, data = column.buffers()
  if not len(column) or data is None:
    return np.zeros(0, np.uint8)
  ends = np.frombuffer(offsets, np.int64)[column.offset :]
  return np.frombuffer(data, np.uint8)[ends[0] : ends[len(column)]]


def _is_ascii(column: pa.LargeBinaryArray) -> bool:
  """Whether all bytes are printable ASCII."""
  data = _data(column)
  return all(
    np.all(data[start : start + _CHUNK] - np.uint8(0x20) < 0x5F)
    for start in range(0, len(data), _CHUNK)
  )


def _composed(column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
  """Text in NFC, without control characters."""
  try:
    characters = column.cast(pa.large_string())
  except pa.ArrowInvalid:  # Some are no UTF-8.
    return _each(_printable, column)
  characters = pc.utf8_normalize(characters, form='NFC')
  column = characters.cast(pa.large_binary())
  odd = pc.match_substring_regex(characters, _CONTROL)
  printable = _each(_printable, column.filter(odd))
  return pc.replace_with_mask(column, odd, printable)


def _printable(key: bytes) -> bytes:
  readable = key.decode('utf-8', 'backslashreplace')
  readable = unicodedata.normalize('NFC', readable)
  return re.sub(
    _CONTROL, lambda found: rf'\x{ord(found[0]):02x}', readable
  ).encode()


def _shortened(key: bytes) -> bytes:
  digest = b'~' + hashlib.sha256(key).hexdigest()[:32].encode()
  start = key[: MAX_BYTES - len(digest)]
  return start.decode('utf-8', 'ignore').encode() + digest


def _each(function, column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
  return pa.array(map(function, column.to_pylist()), pa.large_binary())


def _overlapping(shards: Sequence[np.ndarray]) -> list[int]:
  """Shards whose range of keys meets another's; few, where keys count on."""
  ranges = []
  for i, shard in enumerate(shards):
    if len(shard):
      ends = pc.min_max(pa.array(shard, pa.large_binary())).as_py()
      ranges.append((ends['min'], ends['max'], i))
  found, reach, furthest = set(), b'', None
  for low, high, i in sorted(ranges):
    if furthest is not None and low <= reach:
      found |= {i, furthest}
    if furthest is None or high > reach:
      reach, furthest = high, i
  return sorted(found)


def _in_several(keys: np.ndarray, shards: np.ndarray) -> np.ndarray:
  """Whether each key is in more than one shard; these are in order."""
  order, starts = groups(keys)
  ends = np.append(starts[1:], len(keys))
  several = shards[order[starts]] != shards[order[ends - 1]]
  out = np.zeros(len(keys), bool)
  out[order] = np.repeat(several, ends - starts)
  return out


def _below_common_folder(paths: Sequence[str]) -> list[str]:
  """Paths below the folder that all have in common, without suffix."""
  parts = [path.replace(os.sep, '/').split('/') for path in paths]
  common = len(os.path.commonprefix([p[:-1] for p in parts]))
  return [_SHARD.sub('', '/'.join(p[common:])) for p in parts]
