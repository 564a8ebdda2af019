"""Files of embeddings, read by ranges of rows where they are.

.npy, a member of an .npz, and a column of lists in Parquet, local or behind
any fsspec URL; never a pickle. Shapes: n rows of a file, N of all, D
dimensions.
"""

import bisect
from collections.abc import Sequence
import functools
import threading
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

# Parquet is decoded so many rows at a time.
_BATCH_ROWS = 4_096

# `take` reads rows that are this near each other at once, so many at most.
_NEAR = 16
_TAKEN_AT_ONCE = 8_192

_FIELD = 'embed.path'


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
    with storage.reading(path, _FIELD), storage.open_file(path) as f:
      self.shape, self.dtype, self._offset = _header(f, path)
      end = f.seek(0, 2)
    if end < self._offset + self.shape[0] * self.shape[1] * self.dtype.itemsize:
      raise errors.UserError(
        f'{path}: cut short, {self.shape[0]} rows were written; make it again'
      )

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `RowFile`."""
    row = self.shape[1] * self.dtype.itemsize
    first, count = self._offset + start * row, (stop - start) * self.shape[1]
    if storage.is_url(self.path):
      content = storage.read(self.path, first, (stop - start) * row)
      values = np.frombuffer(content, self.dtype)
    else:
      try:
        values = np.fromfile(self.path, self.dtype, count, offset=first)
      except OSError as e:
        raise errors.RunError(f'{self.path}: cannot be read ({e})') from e
    return _whole(values, (stop - start, self.shape[1]), self.path)


class Npz:
  """See `RowFile`; one array of an .npz, compressed or not."""

  def __init__(self, path: str, name: str):
    """Reads the header; raises UserError naming a file that does not fit."""
    self.path = path
    self._member = f'{name}.npy'
    with storage.reading(path, _FIELD), storage.open_file(path) as f:
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
    return _whole(values, (stop - start, self.shape[1]), self.path)


class Parquet:
  """See `RowFile`; a column of lists of D numbers."""

  def __init__(self, path: str, column: str):
    """Reads the schema; raises UserError naming a file that does not fit.

    Args:
      path: local or URL.
      column: its name; '' = the only column of lists of numbers.
    """
    self.path = path
    with storage.reading(path, _FIELD), storage.open_file(path) as f:
      file = pq.ParquetFile(f)
      self._column = _list_column(file.schema_arrow, path, column)
      kind = file.schema_arrow.field(self._column).type
      if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
      else:
        first = next(
          file.iter_batches(1, columns=[self._column]), {self._column: []}
        )[self._column]
        dim = len(first[0]) if len(first) and first[0].is_valid else 0
      self.shape = (file.metadata.num_rows, dim)
    half = pa.types.is_float16(kind.value_type)
    self.dtype = np.dtype(np.float16 if half else np.float32)
    _check_shape(self.shape, path)

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `RowFile`."""
    cursor = _cursor(self.path, self._column, self.shape[1])
    rows = cursor.read(start, stop).astype(self.dtype, copy=False)
    return _whole(rows, (stop - start, self.shape[1]), self.path)


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
      gaps = (np.diff(near) > _NEAR) | (near[1:] - first >= _TAKEN_AT_ONCE)
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
    with storage.reading(path, _FIELD), storage.open_file(path) as f:
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
  _check_shape(shape, path)
  if dtype.kind != 'f' or dtype.itemsize > 4 or by_columns:
    raise errors.UserError(
      f'{path}: {dtype}{", by columns" * by_columns}; rows are float16 or '
      'float32 in C order; save it again as those'
    )
  return shape, dtype, f.tell()


def _check_shape(shape: tuple[int, ...], path: str) -> None:
  if len(shape) != 2 or not shape[1]:
    raise errors.UserError(
      f'{path}: shape {shape}; needs one row of numbers for every image'
    )


def _whole(values: np.ndarray, shape: tuple[int, int], path: str) -> np.ndarray:
  """The values as rows; raises RunError where the file has lost some."""
  if values.size != shape[0] * shape[1]:
    raise errors.RunError(f'{path}: shorter than it was when it was opened')
  return values.reshape(shape)


def _list_column(schema: pa.Schema, path: str, column: str) -> str:
  """The name of a column of lists of floats."""

  def has_rows(kind):
    lists = (
      pa.types.is_fixed_size_list(kind)
      or pa.types.is_list(kind)
      or pa.types.is_large_list(kind)
    )
    return lists and pa.types.is_floating(kind.value_type)

  found = [field.name for field in schema if has_rows(field.type)]
  if column in found or (not column and len(found) == 1):
    return column or found[0]
  raise errors.UserError(
    f'embed.column={column!r}: {path} has '
    + (f'lists of floats in: {", ".join(found)}' if found else
       'no column with lists of floats')
  )  # fmt: skip


@functools.lru_cache(4)
def _cursor(path: str, column: str, dim: int) -> '_Cursor':
  """Few at a time, since each holds an open file and a decoded batch."""
  return _Cursor(path, column, dim)


class _Cursor:
  """A place in a Parquet column, cheap to move on from and dear to go back.

  A row group is never decoded as a whole: by default it has a million rows.
  """

  def __init__(self, path: str, column: str, dim: int):
    self._path, self._column, self._dim = path, column, dim
    self._lock = threading.Lock()
    self._batches = iter(())
    self._first = 0  # Row of the first of `_rows`.
    self._rows = None

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns rows [stop - start, D]."""
    with self._lock, storage.reading(self._path, _FIELD):
      if self._rows is None or start < self._first:
        self._open(start)
      parts = [np.zeros((0, self._dim), np.float32)]
      while start < stop:
        part = self._rows[start - self._first : stop - self._first]
        parts.append(part)
        start += len(part)
        if start < stop:
          self._first += len(self._rows)
          self._rows = self._decode(next(self._batches))
    return np.concatenate(parts[len(parts) > 1 :])

  def _open(self, row: int) -> None:
    """Begins at the row group that holds a row."""
    file = pq.ParquetFile(
      storage.open_file(self._path), buffer_size=1 << 20, pre_buffer=False
    )
    groups = range(file.metadata.num_row_groups)
    sizes = [file.metadata.row_group(g).num_rows for g in groups]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    group = int(np.searchsorted(starts, row, side='right')) - 1
    self._first = int(starts[group])
    self._batches = file.iter_batches(
      _BATCH_ROWS, row_groups=list(groups)[group:], columns=[self._column],
      use_threads=False,
    )  # fmt: skip
    self._rows = self._decode(next(self._batches))

  def _decode(self, batch: pa.RecordBatch) -> np.ndarray:
    """Rows of a batch; those that are null are zero."""
    lists = batch[self._column]
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    values = lists.drop_null().flatten().to_numpy(zero_copy_only=False)
    lengths = lists.drop_null().value_lengths().to_numpy()
    if np.any(lengths != self._dim):
      raise errors.UserError(
        f'{self._path}: lists of {lengths.min()} to {lengths.max()} numbers in '
        f'{self._column}, {self._dim} in its first row'
      )
    rows = np.zeros((len(lists), self._dim), values.dtype)
    rows[valid] = values.reshape(-1, self._dim)
    return rows
