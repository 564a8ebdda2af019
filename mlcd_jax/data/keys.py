"""Keys of images in one spelling.

A key identifies an image. Sources spell the keys of their records with `spell`,
and readers of embeddings spell the keys of their rows. So equal keys are equal
bytes, whichever program wrote them.
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

# The longest file name on most file systems. All keys lie in one fixed-width
# array, so one key of 100 kB would cost 100 kB for every image.
MAX_BYTES = 255

# Control characters and the two line separators of Unicode. Files of keys have
# one key a line.
_CONTROL = '[\x00-\x1f\x7f-\x9f\u2028\u2029]'

_SHARD = re.compile(r'\.(tar|parquet|array_record|arrayrecord)$')

# Bytes checked at a time (64 MiB) and keys copied at a time, which bound the
# temporary arrays.
_CHUNK = 1 << 26
_CHUNK_KEYS = 1 << 20


def spell(keys: Any) -> np.ndarray:
  r"""Spells keys as UTF-8 bytes.

  The rules, in this order:
    `./` at the beginning is removed;
    bytes that are not UTF-8 and control characters become escapes as `\xe9`,
      and text is normalised to NFC;
    a key longer than MAX_BYTES is cut and ends in a digest of the whole key.
  Spelling a spelled key changes nothing.

  Args:
    keys: text, bytes or integers, as a list or an array of NumPy or Arrow.

  Returns:
    A NumPy array of bytes [N]; a missing key is b''.

  Raises:
    ValueError: the keys have another type.
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
  """Converts text, bytes or integers to bytes; nulls stay nulls.

  Args:
    keys: a list or an array of NumPy or Arrow.

  Raises:
    ValueError: the keys have another type.
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
    # pandas turns integers with nulls into floats. Other fractions do not cast.
    if pa.types.is_floating(kind):
      keys = keys.cast(pa.int64())
    if pa.types.is_integer(keys.type):
      keys = keys.cast(pa.string())
    return keys.cast(pa.large_binary())
  except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as e:
    raise ValueError(
      f'keys of type {kind}; they are text, bytes or integers'
    ) from e


def fixed_width(column: pa.Array) -> np.ndarray:
  """Converts text or bytes without nulls to a NumPy array of bytes [N].

  The width of the array is that of the longest value.
  """
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
  # Nine digits, as img2dataset writes, so that keys sort by number.
  width = max(9, len(str(count)))
  numbers = np.strings.zfill(np.arange(count).astype(f'S{width}'), 9)
  return spell(np.strings.add(_encoded(f'{name}-'), numbers))


def across(shards: Sequence[np.ndarray], paths: Sequence[str]) -> np.ndarray:
  """Concatenates the keys of shards and makes repeated ones unique.

  Two runs of img2dataset both begin with the key 000000000, and two folders may
  have files of the same name. A key that several shards have gets the path of
  its shard as a prefix, as in a/00000/000000000. The prefix is relative to the
  common folder of all shards and has no suffix. Other keys do not change. Nor
  does a key that is repeated within one shard only.

  Args:
    shards: the spelled keys of each shard.
    paths: the path of each shard.

  Returns:
    The keys of all shards in order, [N].
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
  """Groups the rows that have the same key.

  Returns:
    The rows [N] in the order of their keys, and for each distinct key the
    position in that order at which its rows begin. Rows of one key keep their
    order.
  """
  order = np.argsort(keys, kind='stable')
  sorted_keys = keys[order]
  begins = np.ones(len(keys), bool)
  begins[1:] = sorted_keys[1:] != sorted_keys[:-1]
  return order, np.flatnonzero(begins)


def is_shard(path: str) -> bool:
  """Returns whether a path has the suffix of a file with many images."""
  return bool(_SHARD.search(path))


def text(key: bytes) -> str:
  """Returns a spelled key as text."""
  return key.decode('utf-8', 'replace')


def _encoded(key: str) -> bytes:
  """Returns text as UTF-8.

  Python reads file names that are not UTF-8 as text with surrogates. These
  become the original bytes again.
  """
  try:
    return key.encode('utf-8', 'surrogateescape')
  except UnicodeEncodeError:  # A surrogate that stands for no byte.
    return key.encode('utf-8', 'surrogatepass')


def _data(column: pa.LargeBinaryArray) -> np.ndarray:
  """Returns all bytes of a column, concatenated, without copying them."""
  _, offsets, data = column.buffers()
  if not len(column) or data is None:
    return np.zeros(0, np.uint8)
  ends = np.frombuffer(offsets, np.int64)[column.offset :]
  return np.frombuffer(data, np.uint8)[ends[0] : ends[len(column)]]


def _is_ascii(column: pa.LargeBinaryArray) -> bool:
  """Returns whether all bytes are printable ASCII."""
  data = _data(column)
  return all(
    # One comparison tests both ends, 0x20 to 0x7e: lower bytes wrap around.
    np.all(data[start : start + _CHUNK] - np.uint8(0x20) < 0x5F)
    for start in range(0, len(data), _CHUNK)
  )


def _composed(column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
  """Normalises keys to NFC and escapes control and invalid bytes."""
  try:
    characters = column.cast(pa.large_string())
  except pa.ArrowInvalid:  # Some keys are not UTF-8, which only Python escapes.
    return _each(_printable, column)
  characters = pc.utf8_normalize(characters, form='NFC')
  column = characters.cast(pa.large_binary())
  odd = pc.match_substring_regex(characters, _CONTROL)
  printable = _each(_printable, column.filter(odd))
  return pc.replace_with_mask(column, odd, printable)


def _printable(key: bytes) -> bytes:
  """Normalises one key to NFC and escapes its control and invalid bytes."""
  readable = key.decode('utf-8', 'backslashreplace')
  readable = unicodedata.normalize('NFC', readable)
  return re.sub(
    _CONTROL, lambda found: rf'\x{ord(found[0]):02x}', readable
  ).encode()


def _shortened(key: bytes) -> bytes:
  """Cuts a key and appends a digest of it, to at most MAX_BYTES in all."""
  digest = b'~' + hashlib.sha256(key).hexdigest()[:32].encode()
  start = key[: MAX_BYTES - len(digest)]
  # 'ignore' drops a character that the cut has split.
  return start.decode('utf-8', 'ignore').encode() + digest


def _each(function, column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
  """Applies a function of bytes to each key of a column."""
  return pa.array(map(function, column.to_pylist()), pa.large_binary())


def _overlapping(shards: Sequence[np.ndarray]) -> list[int]:
  """Returns the indices of the shards whose key ranges overlap with others.

  A shard's range is from its smallest to its largest key. Only shards with
  overlapping ranges can share a key, and none overlap if the keys count on from
  shard to shard. So most data needs no search through all keys.
  """
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
  """Returns whether each key occurs in more than one shard.

  Args:
    keys: spelled keys [N].
    shards: the ascending shard number of each key, [N].
  """
  order, starts = groups(keys)
  ends = np.append(starts[1:], len(keys))
  # The rows of a key are in ascending order, so its first and last row tell.
  several = shards[order[starts]] != shards[order[ends - 1]]
  out = np.zeros(len(keys), bool)
  out[order] = np.repeat(several, ends - starts)
  return out


def _below_common_folder(paths: Sequence[str]) -> list[str]:
  """Returns the paths relative to their common folder, without suffix."""
  parts = [path.replace(os.sep, '/').split('/') for path in paths]
  common = len(os.path.commonprefix([p[:-1] for p in parts]))
  return [_SHARD.sub('', '/'.join(p[common:])) for p in parts]
