"""Finds the embedding of each image, by key or by the end of a path.

Embeddings made elsewhere have the keys that their program wrote. For example,
clip-retrieval writes the whole path /data/photos/a/0001.jpg of an image whose
key here is a/0001.jpg, or 0001 if it lies in a tar.
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

# Paths are compared if more than this share of the images has no embedding with
# the same key. If there are fewer embeddings than images, it is a share of the
# embeddings.
_FEW = 0.01

# A way to cut paths counts only if it matches this share of the images or
# embeddings that are left. A few equal file names in unrelated data then match
# nothing.
_MOST = 0.5

# The most ways to cut that are applied, one after the other. Folders of images
# that were moved to different places each need their own.
_ROUNDS = 4

_SAMPLE = 1_000  # Paths from which the ways to cut are derived.
_SAME_NAME = 64  # The most paths of one base name to compare each of them with.

_SCHEME = r'\A[A-Za-z][A-Za-z0-9+.-]*://'
_SUFFIX = r'(?i)\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|jp2|ppm)\z'


class _Cut(NamedTuple):
  """A way to cut the paths of images and embeddings, so that equal ends remain.

  Attributes:
    image: the number of leading folders to remove from the path of an image. If
      it is -k, the last k folders of `data.path` are put before the path.
    row: the number of leading folders to remove from the path of an embedding.
  """

  image: int
  row: int


def join(
  source_keys: np.ndarray, row_keys: np.ndarray, root: str = ''
) -> np.ndarray:
  """Returns the embedding row of every record.

  Rows are matched by equal keys. If that leaves out more than a few, the other
  keys are compared as paths, from their end. The first of several rows with the
  same key counts.

  Args:
    source_keys: the keys of the records [N], as text or UTF-8.
    row_keys: the keys of the rows [M], in any order.
    root: the folder of the records; see `root_of`.

  Returns:
    int64 [N], the row of each record, or -1 if it has none.
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
    # A row that repeats the key of a matched row must not match another image.
    used |= _equal(row_keys, source_keys) >= 0
    unused = np.flatnonzero(~used)
    found = _by_paths(source_keys[missing], row_keys[unused], root)
    if found is None:
      break
    good = found >= 0
    rows[missing[good]] = unused[found[good]]
  return rows


def root_of(path: str) -> str:
  """Returns the folder of a `data.path`, without the scheme of a URL.

  It is the deepest folder that holds all files of a glob or range.
  """
  path = paths.expand(path, 'data.path')
  # A path that exists is taken literally, even if it looks like a glob.
  start = path if os.path.exists(path) else re.split(r'[*?\[{]', path)[0]
  if start != path or keys_lib.is_shard(path):
    start = start.rpartition('/')[0]
  if '://' in start:
    return re.sub(_SCHEME, '', start)
  return os.path.abspath(start).replace(os.sep, '/')


def _as_bytes(keys: np.ndarray) -> np.ndarray:
  """Encodes text as UTF-8, which takes a quarter of the memory if ASCII."""
  return np.strings.encode(keys, 'utf-8') if keys.dtype.kind == 'U' else keys


def _equal(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Finds keys in an array.

  Returns:
    The index in `keys` of the first occurrence of each wanted key; -1 if there
    is none or if the wanted key is empty.
  """
  if not len(keys):
    return np.full(len(wanted), -1)
  order = np.argsort(keys, kind='stable')
  place = np.searchsorted(keys, wanted, sorter=order)
  row = order[np.minimum(place, len(order) - 1)]
  return np.where((keys[row] == wanted) & (wanted != b''), row, -1)


def _by_paths(
  images: np.ndarray, rows: np.ndarray, root: str
) -> np.ndarray | None:
  """Matches images to rows by the ends of their paths.

  It tries several ways to cut the beginnings of the paths, with and without the
  suffix, and keeps the one that matches most.

  Args:
    images: the keys of the unmatched images [n].
    rows: the keys of the unused embedding rows [m].
    root: the folder of the images; see `root_of`.

  Returns:
    The index in `rows` of each image's row, or -1. None if less than half of
    the images, or of the rows if these are fewer, have a match.
  """
  if not len(images) or not len(rows):
    return None
  image_paths, row_paths = _paths(images), _paths(rows)
  folders = root.strip('/').split('/') if root.strip('/') else []
  best = None
  for candidate in _cuts(image_paths, row_paths, folders):
    # Compare whole file names, then names without .jpg and the like. The key of
    # an image in a tar has no suffix.
    for suffix in ('', _SUFFIX):
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
  """Converts keys to paths with '/', without the scheme of a URL or './'."""
  paths = pa.array(keys, pa.large_binary()).cast(pa.large_string())
  # pathlib's as_uri writes 'a b' as file:///a%20b.
  quoted = pc.starts_with(paths, 'file://')
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
  """Returns the three most frequent ways to cut a sample of paths.

  Each path of the sample is compared with the paths of the other side that have
  the same base name. It votes for the cuts that keep the longest common end.

  Args:
    image_paths: the paths of the images.
    row_paths: the paths of the embeddings.
    folders: the folders of `data.path`.
  """
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
  """Returns the base names of paths, without the suffix of an image."""
  names = pc.replace_substring_regex(paths, r'\A.*/', '')
  return pc.replace_substring_regex(names, _SUFFIX, '')


def _common_end(
  image: str, row: str, folders: Sequence[str]
) -> tuple[int, _Cut]:
  """Compares the folders of two paths from the end.

  Args:
    image: the path of an image, relative to `data.path`.
    row: the path of an embedding.
    folders: the folders of `data.path`.

  Returns:
    The number of equal folders at the end, and the cut that removes the others.
  """
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
  """Removes leading folders and the suffix from paths.

  Args:
    paths: the paths, with '/'.
    count: the number of leading folders to remove.
    suffix: the pattern of the suffix to remove, or ''.
    folders: the folders of `data.path`.
    extra: if it is -k, the last k of `folders` must come next in the path, and
      are removed too. Otherwise it has no effect.

  Returns:
    The shortened paths as bytes; '' for a path without all these folders.
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
  """Matches shortened paths that are unambiguous.

  Args:
    images: the shortened paths of the images [n].
    rows: the shortened paths of the rows [m].
    row_keys: the whole keys of the rows [m].

  Returns:
    The index in `rows` of each image's row. It is -1 if there is none, if
    several images have the same shortened path, or if rows with different keys
    have it. Rows with equal keys are repeats, of which the first counts.
  """
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
