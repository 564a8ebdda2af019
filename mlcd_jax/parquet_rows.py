"""Rows in a column of lists in Parquet, local or behind any fsspec URL.

Shapes: n rows of a file, D dimensions.
"""

import functools
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_jax import errors
from mlcd_jax import row_files
from mlcd_jax.data import storage

# Parquet is decoded so many rows at a time.
_BATCH_ROWS = 4_096


class Parquet:
  """See `row_files.RowFile`; a column of lists of D numbers."""

  def __init__(self, path: str, column: str):
    """Reads the schema; raises UserError naming a file that does not fit.

    Args:
      path: local or URL.
      column: its name; '' = the only column of lists of numbers.
    """
    self.path = path
    with storage.reading(path, row_files.FIELD), storage.open_file(path) as f:
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
    row_files.check_shape(self.shape, path)

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `row_files.RowFile`."""
    cursor = _cursor(self.path, self._column, self.shape[1])
    rows = cursor.read(start, stop).astype(self.dtype, copy=False)
    return row_files.whole(rows, (stop - start, self.shape[1]), self.path)


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
    with self._lock, storage.reading(self._path, row_files.FIELD):
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
