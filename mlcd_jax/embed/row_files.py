"""Files of embeddings, read in place by ranges of rows.

A file is a .npy, an array of an .npz or a Parquet column (`parquet_rows`). It
is local or an fsspec URL, and is never unpickled. Shapes: n rows of a file, N
rows of all files, D dimensions. D is 0 if the file has no row to tell it.
"""

import bisect
from collections.abc import Sequence
from typing import Any
from typing import Protocol
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_jax import unit
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import storage

# Columns of the metadata that may hold the key, in order of preference:
# img2dataset and this package, clip-retrieval, DataComp.
_KEYS = ('key', 'image_path', 'uid')

# `take` reads rows with one request if they are at most this far apart. At a
# URL a request costs more than its bytes, so any distance up to the most rows
# of one request, _TAKEN_AT_ONCE, will do.
_NEAR = 16
_TAKEN_AT_ONCE = 8_192

FIELD = 'embed.path'  # The config field that errors name.


class RowFile(Protocol):
  """A file of embeddings."""

  path: str
  shape: tuple[int, int]  # (n, D).
  dtype: np.dtype

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns rows [stop - start, D]."""
    ...


class Npy:
  """A `RowFile` of floats [n, D] in the format of `np.save`."""

  def __init__(self, path: str):
    """Reads the header; raises a UserError if the file cannot be used."""
    self.path = path
    self._file = storage.stat(path, FIELD)
    with storage.reading(path, FIELD), storage.open_file(path) as f:
      self.shape, self.dtype, self._offset = _header(f, path)
    end = self._file.size
    if end < self._offset + self.shape[0] * self.shape[1] * self.dtype.itemsize:
      raise errors.UserError(
        f'{path}: cut short, {self.shape[0]} rows were written; make it again'
      )

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `RowFile`."""
    row = self.shape[1] * self.dtype.itemsize
    first = self._offset + start * row
    content = storage.read(self._file, first, (stop - start) * row)
    values = np.frombuffer(content, self.dtype)
    return whole(values, (stop - start, self.shape[1]), self.path)


class Npz:
  """A `RowFile` that is one array of an .npz, compressed or not."""

  def __init__(self, path: str, name: str):
    """Reads the header; raises a UserError if the file cannot be used."""
    self.path = path
    self._member = f'{name}.npy'
    with storage.reading(path, FIELD), storage.open_file(path) as f:
      try:
        with zipfile.ZipFile(f) as z, z.open(self._member) as member:
          self.shape, self.dtype, self._offset = _header(member, path)
      except zipfile.BadZipFile as e:
        raise errors.UserError(f'{path}: not an .npz ({e})') from e
      except KeyError as e:
        names = [n.removesuffix('.npy') for n in z.namelist()]
        raise errors.UserError(
          f'{path}: no array {name!r}; set embed.column to one of: '
          + ', '.join(names)
        ) from e

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `RowFile`."""
    row = self.shape[1] * self.dtype.itemsize
    try:
      with storage.open_file(self.path) as f, zipfile.ZipFile(f) as z:
        with z.open(self._member) as member:
          member.seek(self._offset + start * row)
          content = member.read((stop - start) * row)
    except (OSError, zipfile.BadZipFile) as e:
      raise errors.RunError(f'{self.path}: cannot be read ({e})') from e
    values = np.frombuffer(content, self.dtype)
    return whole(values, (stop - start, self.shape[1]), self.path)


class Mixed:
  """A `RowFile` of weighted means of unit image rows and unit text rows.

  A row is zero if its image row or text row is zero or not finite.
  """

  def __init__(self, images: RowFile, texts: RowFile, weight: float):
    """Takes both files and the weight of the texts, from 0 to 1.

    Raises:
      UserError: the shapes of the files differ.
    """
    # Two files without rows may differ in shape, as not all tell their width.
    if images.shape != texts.shape and images.shape[0] + texts.shape[0]:
      raise errors.UserError(
        f'{texts.path}: shape {texts.shape}, but {images.path} has '
        f'{images.shape}; embed.text_weight needs a text row of the same width '
        'for every image'
      )
    self.path, self.shape = images.path, images.shape
    self.dtype = np.dtype(np.float32)
    self._images, self._texts, self._weight = images, texts, weight

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `RowFile`."""
    image, text = (
      unit.unit_rows(file.read(start, stop))
      for file in (self._images, self._texts)
    )
    both = image.any(1, keepdims=True) & text.any(1, keepdims=True)
    return both * ((1 - self._weight) * image + self._weight * text)


class Sharded:
  """Files of rows as one array [N, D], read by slices.

  Attributes:
    shape: (N, D).
    paths: the paths of the files.
    shard_rows: the number of rows of each file.
    rows_per_image: the number of consecutive rows with the same key.
  """

  def __init__(
    self,
    shards: Sequence[RowFile],
    metadata: Sequence[str | None],
    *,
    rows_per_image: int = 1,
  ):
    """Concatenates files.

    Args:
      shards: the files, at least one.
      metadata: for each file the Parquet file with its keys, or None.
      rows_per_image: see the class.

    Raises:
      UserError: there are no rows, or the files differ in width.
    """
    self._shards = list(shards)
    self._metadata = list(metadata)
    known = [shard for shard in shards if shard.shape[1]]
    if not known:
      raise errors.UserError(
        f'{shards[0].path}: no rows, nor in any other file beside it'
      )
    dim = known[0].shape[1]
    for shard in known:
      if shard.shape[1] != dim:
        raise errors.UserError(
          f'{shard.path}: shape {shard.shape}, but {known[0].path} has {dim} '
          'columns'
        )
    remote = storage.is_url(shards[0].path)
    self._near = _TAKEN_AT_ONCE if remote else _NEAR
    # Rows stay float16 if all files have it, which halves the memory; a mix of
    # types is read as float32.
    half = all(shard.dtype == np.float16 for shard in known)
    self._dtype = np.dtype(np.float16 if half else np.float32)
    self.paths = [shard.path for shard in shards]
    self.shard_rows = [shard.shape[0] for shard in shards]
    self.rows_per_image = rows_per_image
    self._starts = np.concatenate([[0], np.cumsum(self.shard_rows)]).tolist()
    self.shape = (self._starts[-1], dim)

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    parts = [np.zeros((0, self.shape[1]), self._dtype)]
    shard = bisect.bisect_right(self._starts, start) - 1
    while start < stop:
      first, last = self._starts[shard], min(self._starts[shard + 1], stop)
      if start < last:
        parts.append(self._read(shard, start - first, last - first))
      start = last
      shard += 1
    return np.concatenate(parts)

  def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
    """Returns rows of a file; they are zeros if the file has no width."""
    if not self._shards[shard].shape[1]:
      return np.zeros((stop - start, self.shape[1]), self._dtype)
    rows = self._shards[shard].read(start, stop)
    return rows.astype(self._dtype, copy=False)

  def take(self, rows: np.ndarray, at_once: int = _TAKEN_AT_ONCE) -> np.ndarray:
    """Returns single rows [len(rows), D], read in the order of the files.

    Args:
      rows: the numbers of the rows.
      at_once: one read spans at most so many rows.
    """
    out = np.zeros((len(rows), self.shape[1]), self._dtype)
    order = np.argsort(rows, kind='stable')
    start = 0
    while start < len(order):
      first = rows[order[start]]
      near = rows[order[start : start + at_once]]
      gaps = (np.diff(near) > self._near) | (near[1:] - first >= at_once)
      count = int(gaps.argmax()) + 1 if gaps.any() else len(near)
      span = self[int(first) : int(near[count - 1]) + 1]
      out[order[start : start + count]] = span[near[:count] - first]
      start += count
    return out

  def locate(self, row: int) -> tuple[str, int]:
    """Returns the file that holds a row, and the row's place in it."""
    shard = bisect.bisect_right(self._starts, row) - 1
    return self.paths[shard], row - self._starts[shard]

  @property
  def has_keys(self) -> bool:
    """Returns whether every shard has a metadata file with keys."""
    return None not in self._metadata

  def keys(self) -> np.ndarray:
    """Returns the key of every row, [N], see `keys.spell`."""
    shards = range(len(self._shards))
    return np.concatenate([self.shard_keys(shard) for shard in shards])

  def metadata(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
    """Returns the keys and captions of some rows, reading only their shards.

    A missing caption is ''.
    """
    shards = np.searchsorted(self._starts, rows, side='right') - 1
    keys, captions = [''] * len(rows), [''] * len(rows)
    for shard in np.unique(shards).tolist():
      here = np.flatnonzero(shards == shard)
      places = rows[here] - self._starts[shard]
      texts = self._shard_column(shard, ('caption',), needed=False)
      texts = texts.take(pa.array(places)).to_pylist()
      for place, key, text in zip(here, self.shard_keys(shard)[places], texts):
        keys[place], captions[place] = keys_lib.text(key), _caption(text)
    return keys, captions

  def shard_keys(self, shard: int) -> np.ndarray:
    """Returns the key of every row of one file, [n], see `keys.spell`."""
    column = self._shard_column(shard, _KEYS)
    with storage.reading(self._metadata[shard], FIELD):
      return keys_lib.spell(column)

  def _shard_column(
    self, shard: int, names: Sequence[str], *, needed: bool = True
  ) -> pa.ChunkedArray:
    """Returns a column of a shard's metadata.

    Args:
      shard: the number of the shard.
      names: the names of the column, in order of preference.
      needed: False to return nulls if there is no such column.

    Raises:
      UserError: the column is missing or has another number of rows.
    """
    rows, path = self._shards[shard], self._metadata[shard]
    if path is None:
      raise errors.UserError(
        f'{rows.path}: no Parquet file with its keys, without which labels '
        'find no images; put metadata beside it, with a row for every row'
      )
    with storage.reading(path, FIELD), storage.open_file(path) as f:
      found = pq.read_schema(f).names
      name = next((n for n in names if n in found), None)
      if name is None and not needed:
        return pa.chunked_array([pa.nulls(rows.shape[0], pa.string())])
      if name is None:
        raise errors.UserError(
          f'{path}: no column {" or ".join(names)}; it has ' + ', '.join(found)
        )
      f.seek(0)
      column = pq.read_table(f, columns=[name])[name]
    if len(column) != rows.shape[0]:
      raise errors.UserError(
        f'{path}: {len(column)} rows, but {rows.path} has {rows.shape[0]}'
      )
    return column


def _caption(value: Any) -> str:
  """Returns a caption as text; several are joined by newlines.

  A value of another type gives ''.
  """
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, list):
    return '\n'.join(map(_caption, value))
  return value if isinstance(value, str) else ''


def _header(f, path: str) -> tuple[tuple[int, int], np.dtype, int]:
  """Returns the shape, type and first byte of an array in the .npy format."""
  shape, by_columns, dtype, offset = files.npy_header(f.read(files.NPY_HEADER))
  # np.save writes an empty list as float64 of shape (0,), which has no width.
  if shape[:1] == (0,):
    return (0, 0), np.dtype(np.float16), offset
  check_shape(shape, path)
  if dtype.kind != 'f' or dtype.itemsize > 8 or by_columns:
    raise errors.UserError(
      f'{path}: {dtype}{", by columns" * by_columns}; rows are float16, '
      'float32 or float64 in C order; save it again as those'
    )
  return shape, dtype, offset


def check_shape(shape: tuple[int, ...], path: str) -> None:
  """Raises a UserError if an array is not a matrix with columns."""
  if len(shape) != 2 or not shape[1]:
    raise errors.UserError(
      f'{path}: shape {shape}; needs one row of numbers for every image'
    )


def whole(values: np.ndarray, shape: tuple[int, int], path: str) -> np.ndarray:
  """Returns the values as rows; raises a RunError if some are missing."""
  if values.size != shape[0] * shape[1]:
    raise errors.RunError(f'{path}: shorter than it was when it was opened')
  return values.reshape(shape)
