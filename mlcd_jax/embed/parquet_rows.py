"""Rows from a column of lists in a Parquet file, local or an fsspec URL.

The most frequent length of list in the first batch with numbers is the width.
A list that is null, empty or of another length is read as zeros. Zero rows are
later left out and counted, as for every type of file. Shapes: n rows of a file,
D dimensions.
"""

import functools
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlcd_jax.embed import row_files
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import storage

# Rows decoded at a time: 16 MB in float32 at 1,024 dimensions.
_BATCH_ROWS = 4_096


class Parquet:
  """A `row_files.RowFile` that is a Parquet column of lists of D numbers."""

  def __init__(self, path: str, column: str):
    """Reads the schema.

    Args:
      path: the local path or URL.
      column: the name of the column, or '' for the only column of lists of
        numbers.

    Raises:
      UserError: the file cannot be read or has no such column.
    """
    self.path = path
    with storage.reading(path, row_files.FIELD), storage.open_file(path) as f:
      file = pq.ParquetFile(f)
      self._column = _list_column(file.schema_arrow, path, column)
      kind = file.schema_arrow.field(self._column).type
      self.shape = (file.metadata.num_rows, _width(file, path, self._column))
    half = pa.types.is_float16(kind.value_type)
    self.dtype = np.dtype(np.float16 if half else np.float32)

  def read(self, start: int, stop: int) -> np.ndarray:
    """See `row_files.RowFile`."""
    cursor = _cursor(self.path, self._column, self.shape[1])
    rows = cursor.read(start, stop).astype(self.dtype, copy=False)
    return row_files.whole(rows, (stop - start, self.shape[1]), self.path)


def _list_column(schema: pa.Schema, path: str, column: str) -> str:
  """Returns the name of the column of lists of floats.

  Raises:
    UserError: `column` is not one, or it is '' and there is not exactly one.
  """

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


def _width(file: pq.ParquetFile, path: str, column: str) -> int:
  """Returns the most frequent length of the lists; 0 if all are empty.

  It reads batches until one has numbers.

  Raises:
    UserError: fewer than half of these lists have one length.
  """
  kind = file.schema_arrow.field(column).type
  if pa.types.is_fixed_size_list(kind):
    return kind.list_size
  for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
    lengths = batch[column].value_lengths().fill_null(0).to_numpy()
    if lengths.any():
      counts = np.bincount(lengths[lengths > 0])
      if 2 * counts.max() < counts.sum():
        raise errors.UserError(
          f'{path}: lists of {lengths[lengths > 0].min()} to {lengths.max()} '
          f'numbers in {column}; embeddings are of one length. Name another '
          'column in embed.column'
        )
      return int(counts.argmax())
  return 0


@functools.lru_cache(4)
def _cursor(path: str, column: str, dim: int) -> '_Cursor':
  """Returns a cached cursor.

  The cache is small, since each cursor holds an open file and a decoded batch.
  """
  return _Cursor(path, column, dim)


class _Cursor:
  """A position in a Parquet column.

  Moving forward decodes the next batches; moving back reopens the file. A row
  group is not decoded as a whole, since it has a million rows by default.
  """

  def __init__(self, path: str, column: str, dim: int):
    self._path, self._column, self._dim = path, column, dim
    self._lock = threading.Lock()
    self._batches = iter(())
    self._first = 0  # The number in the file of the first of `_rows`.
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
    """Opens the file at the row group that holds a row."""
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
    """Returns the rows of a batch; lists without D numbers become zeros."""
    lists = batch[self._column]
    good = pc.equal(lists.value_lengths(), self._dim).fill_null(False)
    values = lists.filter(good).flatten().to_numpy(zero_copy_only=False)
    rows = np.zeros((len(lists), self._dim), values.dtype)
    rows[good.to_numpy(zero_copy_only=False)] = values.reshape(-1, self._dim)
    return rows
