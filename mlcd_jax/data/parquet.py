"""Parquet with a column of image files, as Hugging Face data sets ship.

Parquet cannot be read at random, a row costs its whole row group. So each
file is copied once to `data.cache_dir` as Arrow, which is mapped into memory,
as Hugging Face's own library does.
"""

from concurrent import futures
import functools
import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.data import cache
from mlcd_jax.data import problems
from mlcd_jax.data import storage

_BATCH_ROWS = 256
_COPY = pa.schema(
  [
    ('key', pa.binary()),
    ('image', pa.binary()),  # Null where there is none.
    ('label', pa.int64()),
    ('caption', pa.binary()),
    ('failed', pa.bool_()),  # img2dataset keeps a row of a failed download.
  ]
)


class ParquetSource:
  """See `sources.Source`; reads the copies.

  A key is the column `key` as img2dataset writes it, else the file's name and
  the row in it.
  """

  class_names = ()

  def __init__(self, paths: list[str]):
    """Takes the copies' paths."""
    self._paths = paths
    tables = [_open_copy(path) for path in paths]
    rows = [_valid(table) for table in tables]
    self._ends = np.cumsum([len(r) for r in rows])
    self._rows = files.SharedArray(np.concatenate(rows))
    self._keys = files.SharedArray(
      np.concatenate(
        [
          np.array(table['key'].take(pa.array(r)).to_pylist(), np.bytes_)
          for table, r in zip(tables, rows)
        ]
      )
    )
    self.num_classes = max(_num_classes(table) for table in tables)

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard = int(np.searchsorted(self._ends, index, side='right'))
    table = _open_copy(self._paths[shard])
    row = int(self._rows[index])
    return {
      'key': self._keys[index].decode(),
      'image': table['image'][row].as_py(),
      'label': table['label'][row].as_py(),
      'caption': table['caption'][row].as_py().decode('utf-8', 'replace'),
    }

  def keys(self) -> np.ndarray:
    """See `sources.Source`."""
    return self._keys.array


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> ParquetSource:
  """Opens the files of `data.path`; '{split}' in it is replaced."""
  shards = storage.find(data.path.replace('{split}', split), ['.parquet'])
  with futures.ThreadPoolExecutor(4) as pool:
    copies = list(pool.map(functools.partial(_copy, data=data), shards))
  for shard, copy in zip(shards, copies):
    if copy is None:
      reason = 'unreadable shard' if shard.size else 'empty shard'
      found.add(shard.path, reason)
      continue
    table = _open_copy(copy)
    for key in table['key'].filter(_missing(table)).to_pylist():
      found.add(key.decode('utf-8', 'replace'), 'no image')
  copies = [copy for copy in copies if copy is not None]
  if not copies:
    raise errors.UserError(f'data.path={data.path}: no Parquet in it')
  return ParquetSource(copies)


def _copy(shard: storage.File, data: ml_collections.ConfigDict) -> str | None:
  """The copy of one file, made if need be; None where it is no Parquet."""
  columns = (
    data.get('image_key', 'image'),
    data.label_key,
    data.get('caption_key', 'caption'),
  )
  copy = cache.place(
    shard, data.get('cache_dir', ''), f'.{".".join(columns)}.arrow'
  )
  if copy.exists():
    return str(copy)
  with storage.reading(shard.path), storage.open_file(shard.path) as f:
    try:
      parquet = pq.ParquetFile(f)
      with cache.writing(copy) as temporary:
        _write_copy(parquet, temporary, shard, columns)
    except pa.ArrowInvalid:
      return None
  return str(copy)


def _write_copy(
  parquet: pq.ParquetFile,
  path: pathlib.Path,
  shard: storage.File,
  columns: tuple[str, str, str],
) -> None:
  """Writes the columns of `_COPY`."""
  image, label, caption = columns
  names = parquet.schema_arrow.names
  if image not in names:
    raise errors.UserError(
      f'data.image_key={image}: {shard.path} has ' + ', '.join(names)
    )
  stem = pathlib.PurePosixPath(shard.path).stem
  schema = _COPY.with_metadata(
    {'num_classes': str(_declared_classes(parquet.schema_arrow, label))}
  )
  wanted = [n for n in (*columns, 'key', 'status') if n in names]
  first = 0
  with pa.OSFile(str(path), 'wb') as f, pa.ipc.new_file(f, schema) as copy:
    batches = parquet.iter_batches(_BATCH_ROWS, columns=wanted)
    for batch in storage.each(shard.path, batches):
      rows = range(first, first + len(batch))
      first += len(batch)
      keys = [f'{stem}-{row:09d}'.encode() for row in rows]
      if 'key' in names:
        given = batch['key'].cast(pa.binary()).to_pylist()
        keys = [k if k is not None else made for k, made in zip(given, keys)]
      failed = pa.array([False] * len(batch))
      if 'status' in names:
        failed = pc.not_equal(batch['status'], 'success').fill_null(False)
      pixels = batch[image]
      if pa.types.is_struct(pixels.type):  # Hugging Face: {bytes, path}.
        pixels = pc.struct_field(pixels, 'bytes')
      copy.write_batch(
        pa.record_batch(
          [
            pa.array(keys, pa.binary()),
            pixels.cast(pa.binary()),
            _labels(batch, label),
            _captions(batch, caption),
            failed,
          ],
          schema=schema,
        )
      )


def _labels(batch: pa.RecordBatch, name: str) -> pa.Array:
  """int64, -1 where there is none; only integers are classes."""
  if name in batch.schema.names and pa.types.is_integer(batch[name].type):
    return batch[name].cast(pa.int64()).fill_null(-1)
  return pa.array(np.full(len(batch), -1))


def _captions(batch: pa.RecordBatch, name: str) -> pa.Array:
  """UTF-8 or what is meant to be, empty where there is none; lists as lines."""
  if name in batch.schema.names:
    kind = batch[name].type
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
      return pc.binary_join(batch[name], '\n').cast(pa.binary()).fill_null(b'')
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
      return batch[name].cast(pa.binary()).fill_null(b'')
  return pa.array([b''] * len(batch), pa.binary())


def _declared_classes(schema: pa.Schema, label: str) -> int:
  """The number of classes in Hugging Face's notes, 0 without."""
  try:
    notes = json.loads(schema.metadata[b'huggingface'])
    return len(notes['info']['features'][label]['names'])
  except (KeyError, TypeError, ValueError):
    return 0


def _num_classes(table: pa.Table) -> int:
  declared = int(table.schema.metadata[b'num_classes'])
  largest = pc.max(table['label']).as_py()
  return declared or 1 + (-1 if largest is None else largest)


def _valid(table: pa.Table) -> np.ndarray:
  """Rows with an image, int64."""
  good = pc.and_(pc.is_valid(table['image']), pc.invert(table['failed']))
  return np.flatnonzero(good.to_numpy())


def _missing(table: pa.Table) -> pa.ChunkedArray:
  """Which rows should have an image and have none."""
  return pc.and_(pc.is_null(table['image']), pc.invert(table['failed']))


@functools.lru_cache(4_096)
def _open_copy(path: str) -> pa.Table:
  """Maps a copy into memory, which needs no open file once it is mapped."""
  with pa.memory_map(path) as file, pa.ipc.open_file(file) as reader:
    return reader.read_all()
