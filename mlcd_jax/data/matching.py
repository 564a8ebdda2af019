"""Which embedding belongs to which image: by key, or by the end of a path.

Embeddings made elsewhere have the keys that their maker gave. clip-retrieval
writes whole paths of image files, as /data/photos/a/0001.jpg, where the key is
a/0001.jpg, or 0001 in a tar.
"""

import collections
from collections.abc import Sequence
import logging
import os
import re
from typing import NamedTuple
from urllib import parse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import paths

_log = logging.getLogger(__name__)

# Paths are compared where more than this share of the images, or of the
# embeddings if these are fewer, has no partner with the same key.
_FEW = 0.01

# How paths agree must hold for this share of those that are left, so that a
# few equal base names in other data match nothing.
_MOST = 0.5

# Times that paths are compared, for data of several folders.
_ROUNDS = 4

_SAMPLE = 1_000  # Paths by whose ends the others are cut.
_SAME_NAME = 64  # Paths of one base name that are looked at.

_SCHEME = r'\A[A-Za-z][A-Za-z0-9+.-]*://'
_SUFFIX = r'(?i)\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|jp2|ppm)\z'


class _Cut(NamedTuple):
  """How many folders are left out at the beginning of paths."""

  image: int  # Negative: so many of `data.path` are put before.
  row: int


def join(
  source_keys: np.ndarray, row_keys: np.ndarray, root: str = ''
) -> np.ndarray:
  """Returns the embedding row of every record; -1 where there is none.

  Of rows with the same key the first counts. If not nearly all keys are equal,
  those of the others are compared as paths from their end.

  Args:
    source_keys: [N], the records' keys, text or UTF-8.
    row_keys: [M], the keys of the rows, in any order.
    root: folder of the records, see `root_of`.
  """
  source_keys, row_keys = _as_bytes(source_keys), _as_bytes(row_keys)
  rows = _equal(source_keys, row_keys)
  most = min(len(source_keys), len(row_keys))
  for _ in range(_ROUNDS):
    missing = np.flatnonzero(rows < 0)
    if len(source_keys) - len(missing) >= (1 - _FEW) * most:
      break
    used = np.zeros(len(row_keys), bool)
    used[rows[rows >= 0]] = True
    used |= _equal(row_keys, source_keys) >= 0
    unused = np.flatnonzero(~used)
    found = _by_paths(source_keys[missing], row_keys[unused], root)
    if found is None:
      break
    good = found >= 0
    rows[missing[good]] = unused[found[good]]
  return rows


def root_of(path: str) -> str:
  """Returns the folder that all files of a `data.path` lie in."""
  path = paths.expand(path, 'data.path')
  # The name of a folder may look like a glob.
  start = path if os.path.exists(path) else re.split(r'[*?\[{]', path)[0]
  if start != path or keys_lib.is_shard(path):
    start = start.rpartition('/')[0]
  if '://' in start:
    return re.sub(_SCHEME, '', start)
  return os.path.abspath(start).replace(os.sep, '/')


def _as_bytes(keys: np.ndarray) -> np.ndarray:
  """Text as UTF-8, a quarter of the memory."""
  return np.strings.encode(keys, 'utf-8') if keys.dtype.kind == 'U' else keys


def _equal(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """The first place of each wanted key; -1 where it is not, or empty."""
  if not len(keys):
    return np.full(len(wanted), -1)
  order = np.argsort(keys, kind='stable')
  place = np.searchsorted(keys, wanted, sorter=order)
  row = order[np.minimum(place, len(order) - 1)]
  return np.where((keys[row] == wanted) & (wanted != b''), row, -1)


def _by_paths(
  images: np.ndarray, rows: np.ndarray, root: str
) -> np.ndarray | None:
  """Like `_equal`, of what is left of paths; None where most do not fit."""
  if not len(images) or not len(rows):
    return None
  image_paths, row_paths = _paths(images), _paths(rows)
  folders = root.strip('/').split('/') if root.strip('/') else []
  best = None
  for candidate in _cuts(image_paths, row_paths, folders):
    for suffix in ('', _SUFFIX):  # As they are, then without .jpg.
      found = _unique(
        _shorten(image_paths, max(0, candidate.image), suffix),
        _shorten(row_paths, candidate.row, suffix, folders, candidate.image),
        rows,
      )
      if best is None or np.sum(found >= 0) > np.sum(best >= 0):
        best = found
  if best is None or np.sum(best >= 0) < _MOST * min(len(images), len(rows)):
    return None
  first = int(np.argmax(best >= 0))
  _log.warning(
    '%d embeddings are matched to images by the end of their paths, such as '
    '%s to %s',
    np.sum(best >= 0),
    keys_lib.text(rows[best[first]]),
    keys_lib.text(images[first]),
  )
  return best


def _paths(keys: np.ndarray) -> pa.LargeStringArray:
  """Keys as paths with '/', without the scheme of a URL."""
  paths = pa.array(keys, pa.large_binary()).cast(pa.large_string())
  quoted = pc.starts_with(paths, 'file://')  # As pathlib's as_uri writes it.
  if pc.any(quoted).as_py():
    whole = [parse.unquote(p) for p in paths.filter(quoted).to_pylist()]
    paths = pc.replace_with_mask(
      paths, quoted, pa.array(whole, pa.large_string())
    )
  paths = pc.replace_substring_regex(paths, _SCHEME, '')
  paths = pc.replace_substring(paths, '\\', '/')
  paths = pc.replace_substring_regex(paths, r'/(\.?/)+', '/')
  return pc.replace_substring_regex(paths, r'\A\.?/', '')


def _cuts(
  image_paths: pa.Array, row_paths: pa.Array, folders: Sequence[str]
) -> list[_Cut]:
  """The likeliest ways to cut paths, by a sample with equal base names."""
  few, many = sorted((image_paths, row_paths), key=len)
  places = np.linspace(0, len(few) - 1, min(len(few), _SAMPLE)).astype(int)
  sample = few.take(pa.array(places))
  names, wanted = _names(many), _names(sample)
  candidates = np.flatnonzero(pc.is_in(names, wanted))
  candidates = candidates[:: max(1, len(candidates) // (_SAMPLE * _SAME_NAME))]
  by_name = collections.defaultdict(list)
  for name, path in zip(
    names.take(candidates).to_pylist(), many.take(candidates).to_pylist()
  ):
    if len(by_name[name]) < _SAME_NAME:
      by_name[name].append(path)
  votes = collections.Counter()
  for name, path in zip(wanted.to_pylist(), sample.to_pylist()):
    cuts = []
    for other in by_name[name]:
      pair = (path, other) if few is image_paths else (other, path)
      cuts.append(_common_end(*pair, folders))
    if cuts:
      longest = max(common for common, _ in cuts)
      votes.update({cut for common, cut in cuts if common == longest})
  return [cut for cut, _ in votes.most_common(3)]


def _names(paths: pa.Array) -> pa.Array:
  """Base names without the suffix of an image."""
  names = pc.replace_substring_regex(paths, r'\A.*/', '')
  return pc.replace_substring_regex(names, _SUFFIX, '')


def _common_end(
  image: str, row: str, folders: Sequence[str]
) -> tuple[int, _Cut]:
  """How many folders agree from the end, and what is before them."""
  image_folders = [*folders, *image.split('/')[:-1]]
  row_folders = row.split('/')[:-1]
  common = 0
  for a, b in zip(reversed(image_folders), reversed(row_folders)):
    if a != b:
      break
    common += 1
  cut = len(image_folders) - common - len(folders)
  return common, _Cut(cut, len(row_folders) - common)


def _shorten(
  paths: pa.Array,
  count: int,
  suffix: str,
  folders: Sequence[str] = (),
  extra: int = 0,
) -> np.ndarray:
  """Paths without their first folders; '' where they have not as many.

  Args:
    paths: with '/'.
    count: folders left out.
    suffix: pattern of what is left out at the end.
    folders: of `data.path`.
    extra: negative: the last so many of them have to follow, and go too.
  """
  before = ''.join(f'{f}/' for f in folders[len(folders) + extra :]) * (
    extra < 0
  )
  pattern = rf'\A(?:[^/]*/){{{count}}}' + re.escape(before)
  fits = pc.match_substring_regex(paths, pattern)
  paths = pc.replace_substring_regex(paths, pattern, '')
  if suffix:
    paths = pc.replace_substring_regex(paths, suffix, '')
  return keys_lib.fixed_width(pc.if_else(fits, paths, ''))


def _unique(
  images: np.ndarray, rows: np.ndarray, row_keys: np.ndarray
) -> np.ndarray:
  """Like `_equal`; -1 also where several images or keys are left the same."""
  found = _equal(images, rows)
  order, starts = keys_lib.groups(images)
  counts = np.diff(np.append(starts, len(images)))
  found[order[np.repeat(counts > 1, counts)]] = -1
  order, starts = keys_lib.groups(rows)
  sorted_keys = row_keys[order]
  changes = np.zeros(len(rows), bool)
  changes[1:] = sorted_keys[1:] != sorted_keys[:-1]
  changes[starts] = False
  several = np.logical_or.reduceat(changes, starts)
  ambiguous = np.zeros(len(rows), bool)
  counts = np.diff(np.append(starts, len(rows)))
  ambiguous[order[np.repeat(several, counts)]] = True
  found[(found >= 0) & ambiguous[np.maximum(found, 0)]] = -1
  return found
