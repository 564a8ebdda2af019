"""Files of embeddings, read by ranges of rows where they are.

.npy and a member of an .npz, local or behind any fsspec URL; never a pickle.
Parquet: see `parquet_rows`. Shapes: n rows of a file, N of all, D dimensions.
"""

import bisect
from collections.abc import Sequence
from typing import Protocol
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_jax import errors
from mlcd_jax import points
from mlcd_jax.data import storage

# Columns of the metadata that hold a key: img2dataset's and ours, what
# clip-retrieval always writes, and DataComp's.
_KEYS = ('key', 'image_path', 'uid')

# `take` reads rows that are this near each other at once, so many at most;
# behind URLs, where a request costs more than its bytes, always so many.
_NEAR = 16
_TAKEN_AT_ONCE = 8_192

FIELD = 'embed.path'  # Whose files they are.


class RowFile(Protocol):
  """One file of rows."""

  path: str
  shape: tuple[int, int]  # (n, D).
  dtype: np.dtype

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns rows [stop - start, D]."""
    ...


class Npy:
  """See `RowFile`; float16 or float32 [n, D] as `np.save` writes it."""

  def __init__(self, path: str):
    """Reads the header; raises UserError naming a file that does not fit."""
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
  """See `RowFile`; one array of an .npz, compressed or not."""

  def __init__(self, path: str, name: str):
    """Reads the header; raises UserError naming a file that does not fit."""
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
  """See `RowFile`; image rows with unit text rows mixed in.

  A row whose image or text is zero or not finite is zero.
  """

  def __init__(self, images: RowFile, texts: RowFile, weight: float):
    """Takes both files and the text's weight, 0 to 1.

    Raises:
      UserError: their shapes differ.
    """
    if images.shape != texts.shape:
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
      points.unit_rows(file.read(start, stop))
      for file in (self._images, self._texts)
    )
    both = image.any(1, keepdims=True) & text.any(1, keepdims=True)
    return both * ((1 - self._weight) * image + self._weight * text)


class Sharded:
  """Files of rows as one array [N, D], read by slices.

  Attributes:
    shape: (N, D).
    paths: of the files.
    shard_rows: rows of each file.
  """

  def __init__(self, shards: Sequence[RowFile], metadata: Sequence[str | None]):
    """Puts files in a row.

    Args:
      shards: at least one.
      metadata: of each the Parquet file with its keys, if there is one.

    Raises:
      UserError: a file has other columns than the first.
    """
    self._shards = list(shards)
    self._metadata = list(metadata)
    dim = shards[0].shape[1]
    for shard in shards:
      if shard.shape[1] != dim:
        raise errors.UserError(
          f'{shard.path}: shape {shard.shape}, but {shards[0].path} has {dim} '
          'columns'
        )
    remote = storage.is_url(shards[0].path)
    self._near = _TAKEN_AT_ONCE if remote else _NEAR
    self._dtype = np.result_type(*(shard.dtype for shard in shards))
    self.paths = [shard.path for shard in shards]
    self.shard_rows = [shard.shape[0] for shard in shards]
    self._starts = np.concatenate([[0], np.cumsum(self.shard_rows)]).tolist()
    self.shape = (self._starts[-1], dim)

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    parts = [np.zeros((0, self.shape[1]), self._dtype)]
    shard = bisect.bisect_right(self._starts, start) - 1
    while start < stop:
      first, last = self._starts[shard], min(self._starts[shard + 1], stop)
      if start < last:
        part = self._shards[shard].read(start - first, last - first)
        parts.append(part.astype(self._dtype, copy=False))
      start = last
      shard += 1
    return np.concatenate(parts)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """Returns single rows [len(rows), D], read in the order of the files."""
    out = np.zeros((len(rows), self.shape[1]), self._dtype)
    order = np.argsort(rows, kind='stable')
    start = 0
    while start < len(order):
      first = rows[order[start]]
      near = rows[order[start : start + _TAKEN_AT_ONCE]]
      gaps = (np.diff(near) > self._near) | (near[1:] - first >= _TAKEN_AT_ONCE)
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
    """Whether every file has metadata."""
    return None not in self._metadata

  def keys(self) -> np.ndarray:
    """Returns the key of every row, [N]."""
    return self._column(_KEYS)

  def captions(self) -> np.ndarray:
    """Returns the caption of every row, [N]."""
    return self._column(('caption',))

  def metadata(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
    """Returns keys and captions of some rows, reading only their shards.

    Captions are empty where there are none.
    """
    shards = np.searchsorted(self._starts, rows, side='right') - 1
    keys, captions = [''] * len(rows), [''] * len(rows)
    for shard in np.unique(shards).tolist():
      found = (
        self.shard_keys(shard),
        self._shard_column(shard, ('caption',), needed=False),
      )
      for place in np.flatnonzero(shards == shard).tolist():
        row = int(rows[place]) - self._starts[shard]
        keys[place], captions[place] = (str(column[row]) for column in found)
    return keys, captions

  def shard_keys(self, shard: int) -> np.ndarray:
    """Returns the key of every row of one file, [n]."""
    return self._shard_column(shard, _KEYS)

  def _column(self, names: Sequence[str]) -> np.ndarray:
    return np.concatenate(
      [self._shard_column(shard, names) for shard in range(len(self._shards))]
    )

  def _shard_column(
    self, shard: int, names: Sequence[str], *, needed: bool = True
  ) -> np.ndarray:
    """The first of the columns that there is; empty text if not needed."""
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
        return np.full(rows.shape[0], '')
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
    if column.null_count:
      column = column.cast(pa.string()).fill_null('')
    return column.to_numpy(zero_copy_only=False).astype(str)


def _header(f, path: str) -> tuple[tuple[int, int], np.dtype, int]:
  """Shape, type and first byte of an array in the .npy format."""
  version = np.lib.format.read_magic(f)
  read = (
    np.lib.format.read_array_header_1_0
    if version == (1, 0)
    else np.lib.format.read_array_header_2_0
  )
  shape, by_columns, dtype = read(f)
  check_shape(shape, path)
  if dtype.kind != 'f' or dtype.itemsize > 4 or by_columns:
    raise errors.UserError(
      f'{path}: {dtype}{", by columns" * by_columns}; rows are float16 or '
      'float32 in C order; save it again as those'
    )
  return shape, dtype, f.tell()


def check_shape(shape: tuple[int, ...], path: str) -> None:
  """Raises UserError naming a file that holds no rows of numbers."""
  if len(shape) != 2 or not shape[1]:
    raise errors.UserError(
      f'{path}: shape {shape}; needs one row of numbers for every image'
    )


def whole(values: np.ndarray, shape: tuple[int, int], path: str) -> np.ndarray:
  """The values as rows; raises RunError where the file has lost some."""
  if values.size != shape[0] * shape[1]:
    raise errors.RunError(f'{path}: shorter than it was when it was opened')
  return values.reshape(shape)
