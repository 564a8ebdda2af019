"""Parquet files with a column of images, such as Hugging Face data sets.

Reading one row of Parquet costs its whole row group. So each file is copied
once to `data.cache_dir` as Arrow, which is mapped into memory and has cheap
random access. Hugging Face's own library does the same.
"""

from concurrent import futures
import functools
import json
import logging
import pathlib
from typing import Any

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlcd_jax.data import cache
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import storage

_log = logging.getLogger(__name__)

_VERSION = 2  # Of the copies; a change of `_COPY` needs a new one.
_BATCH_ROWS = 256  # Rows copied at a time; few, because images are large.
_COPY = pa.schema(
  [
    ('key', pa.binary()),
    ('image', pa.binary()),  # Null if there is none.
    ('label', pa.int64()),  # -1 if there is none.
    ('caption', pa.binary()),
    ('failed', pa.bool_()),  # img2dataset keeps rows of failed downloads.
  ]
)


class ParquetSource:
  """A source of Parquet files, read from their copies; see `sources`.

  A key is the value of img2dataset's column `key`, or else the name of the file
  and the row in it. `keys.across` makes keys of several files unique.
  """

  class_names = ()

  def __init__(self, paths: list[str], shards: list[str]):
    """Opens the copies `paths` of the Parquet files `shards`, at least one."""
    self._paths = paths
    tables = [_open_copy(path) for path in paths]
    rows = [_valid(table) for table in tables]
    self._ends = np.cumsum([len(r) for r in rows])
    self._rows = files.SharedArray(np.concatenate(rows))
    self._keys = files.SharedArray(
      keys_lib.across(
        [
          keys_lib.spell(table['key'].take(pa.array(r)))
          for table, r in zip(tables, rows)
        ],
        shards,
      )
    )
    notes = [_note(table, 'label_problem') for table in tables]
    self.label_problem = next(filter(None, notes), '')
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
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return self._keys.array

  def labels(self) -> np.ndarray:
    """Returns the class numbers int64 [N], read from the copies anew."""
    tables = [_open_copy(path)['label'].to_numpy() for path in self._paths]
    starts = np.concatenate([[0], self._ends])
    return np.concatenate(
      [
        labels[self._rows[start:end]]
        for labels, start, end in zip(tables, starts, starts[1:])
      ]
    )


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> ParquetSource:
  """Opens Arrow copies of the files of `data.path`; see `sources.make`.

  Raises:
    UserError: no file is readable, or a column of images holds something else.
  """
  shards = storage.find(data.path.replace('{split}', split), ['.parquet'])
  with futures.ThreadPoolExecutor(4) as pool:
    copies = list(pool.map(functools.partial(_copy, data=data), shards))
  unread = ''
  for shard, copy in zip(shards, copies):
    if copy is None:
      reason = 'unreadable shard' if shard.size else 'empty shard'
      found.add(shard.path, reason)
      continue
    table = _open_copy(copy)
    for key in table['key'].filter(_missing(table)).to_pylist():
      found.add(key.decode('utf-8', 'replace'), 'no image')
    found.leave_out('failed download', pc.sum(table['failed']).as_py() or 0)
    unread = unread or _note(table, 'caption_problem')
  if unread:
    _log.warning(
      'data.caption_key=%s: %s there is no text; no captions are read',
      data.caption_key, unread,
    )  # fmt: skip
  readable = [(c, s.path) for c, s in zip(copies, shards) if c is not None]
  if not readable:
    raise errors.UserError(f'data.path={data.path}: no Parquet in it')
  return ParquetSource(*map(list, zip(*readable)))


def _copy(shard: storage.File, data: ml_collections.ConfigDict) -> str | None:
  """Returns the path of a file's copy, made if missing; None if not Parquet."""
  columns = (
    data.get('image_key', 'image'),
    data.label_key,
    data.get('caption_key', 'caption'),
  )
  copy = cache.place(
    shard, data.get('cache_dir', ''), f'.{".".join(columns)}.{_VERSION}.arrow'
  )
  if copy.exists():
    return str(copy)
  with storage.reading(shard.path), storage.open_file(shard.path) as f:
    try:
      parquet = pq.ParquetFile(f)
      with cache.writing(copy) as temporary:
        _write_copy(parquet, temporary, shard, columns)
    except pa.ArrowException:
      return None
  return str(copy)


def _write_copy(
  parquet: pq.ParquetFile,
  path: pathlib.Path,
  shard: storage.File,
  columns: tuple[str, str, str],
) -> None:
  """Writes the columns of `_COPY`, and the notes that `_note` reads."""
  image, label, caption = columns
  _check_image(parquet.schema_arrow, image, shard)
  names = parquet.schema_arrow.names
  labels, label_problem = _labels(parquet, label)
  stem = pathlib.PurePosixPath(shard.path).stem
  notes = {
    'num_classes': str(_declared_classes(parquet.schema_arrow, label)),
    'label_problem': label_problem,
    'caption_problem': _caption_problem(parquet.schema_arrow, caption),
  }
  schema = _COPY.with_metadata(notes)
  wanted = [n for n in {image, caption, 'key', 'status'} if n in names]
  first = 0
  with pa.OSFile(str(path), 'wb') as f, pa.ipc.new_file(f, schema) as copy:
    batches = parquet.iter_batches(_BATCH_ROWS, columns=wanted)
    for batch in storage.each(shard.path, batches):
      rows = range(first, first + len(batch))
      first += len(batch)
      keys = [f'{stem}-{row:09d}'.encode() for row in rows]
      given = _keys(batch)
      if given is not None:
        keys = [k or made for k, made in zip(given.to_pylist(), keys)]
      copy.write_batch(
        pa.record_batch(
          [
            pa.array(keys, pa.binary()),
            _images(batch, image),
            pa.array(labels[rows.start : rows.stop], pa.int64()),
            _captions(batch, caption, notes['caption_problem']),
            _failed(batch),
          ],
          schema=schema,
        )
      )


def _plain_type(kind: pa.DataType) -> pa.DataType:
  """Returns the type of the values of a dictionary or extension type."""
  while True:
    if isinstance(kind, pa.BaseExtensionType):
      kind = kind.storage_type
    elif pa.types.is_dictionary(kind):
      kind = kind.value_type
    else:
      return kind


def _plain(array: pa.Array) -> pa.Array:
  """Returns the values of a dictionary or extension array as a plain array."""
  while True:
    if isinstance(array.type, pa.BaseExtensionType):
      array = array.storage
    elif pa.types.is_dictionary(array.type):
      array = array.dictionary_decode()
    else:
      return array


def _is_bytes(kind: pa.DataType) -> bool:
  return (
    pa.types.is_binary(kind)
    or pa.types.is_large_binary(kind)
    or pa.types.is_binary_view(kind)
    or pa.types.is_fixed_size_binary(kind)
  )


def _is_text(kind: pa.DataType) -> bool:
  return (
    pa.types.is_string(kind)
    or pa.types.is_large_string(kind)
    or pa.types.is_string_view(kind)
  )


def _is_list(kind: pa.DataType) -> bool:
  return (
    pa.types.is_list(kind)
    or pa.types.is_large_list(kind)
    or pa.types.is_fixed_size_list(kind)
    or pa.types.is_list_view(kind)
    or pa.types.is_large_list_view(kind)
  )


def _check_image(schema: pa.Schema, name: str, shard: storage.File) -> None:
  """Raises a UserError if a column cannot hold image files."""
  if schema.names.count(name) != 1:
    raise errors.UserError(
      f'data.image_key={name}: {shard.path} has ' + ', '.join(schema.names)
    )
  kind = _plain_type(schema.field(name).type)
  if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
    kind = _plain_type(kind.field('bytes').type)
  if not (_is_bytes(kind) or pa.types.is_null(kind)):
    raise errors.UserError(
      f'data.image_key={name}: {shard.path} has {kind} there; name a column '
      'with the bytes of one image file a row, or {bytes, path} of it'
    )


def _images(batch: pa.RecordBatch, name: str) -> pa.Array:
  """Returns the bytes of the images; null if a row has none."""
  images = _plain(batch[name])
  if pa.types.is_struct(images.type):  # Hugging Face: {bytes, path}.
    images = _plain(pc.struct_field(images, 'bytes'))
  return images.cast(pa.binary())


def _keys(batch: pa.RecordBatch) -> pa.Array | None:
  """Returns the column of keys as bytes; None if there is no usable one."""
  if 'key' not in batch.schema.names:
    return None
  try:
    return keys_lib.as_bytes(_plain(batch['key']))
  except ValueError:  # Another type, such as dates, which has a text form.
    return _texts(batch, 'key')


def _texts(batch: pa.RecordBatch, name: str) -> pa.Array | None:
  """Returns a column as the bytes of its text; None if that is impossible."""
  if name not in batch.schema.names:
    return None
  texts = _plain(batch[name])
  if not (_is_bytes(texts.type) or _is_text(texts.type)):
    try:
      texts = texts.cast(pa.string())
    except pa.ArrowException:
      return None
  return texts.cast(pa.binary())


def _failed(batch: pa.RecordBatch) -> pa.Array:
  """Returns whether each row is a failed download by img2dataset's status."""
  status = batch['status'] if 'status' in batch.schema.names else None
  if status is None or not _is_text(_plain_type(status.type)):
    return pa.array([False] * len(batch))
  status = _plain(status).cast(pa.string())
  return pc.starts_with(status, 'failed_to_').fill_null(False)


def _labels(parquet: pq.ParquetFile, name: str) -> tuple[np.ndarray, str]:
  """Returns class numbers int64 [n], -1 if missing, and the `label_problem`."""
  schema = parquet.schema_arrow
  none = np.full(parquet.metadata.num_rows, -1)
  if schema.names.count(name) != 1:
    return none, ''
  kind = _plain_type(schema.field(name).type)
  if pa.types.is_null(kind):
    return none, ''
  if not (
    pa.types.is_integer(kind)
    or pa.types.is_boolean(kind)
    or pa.types.is_floating(kind)  # pandas stores integers with nulls so.
    or pa.types.is_decimal(kind)
  ):
    return none, 'text' if _is_text(kind) else f'of type {kind}'
  labels = [_plain(c) for c in parquet.read([name])[name].chunks]
  try:
    labels = pa.chunked_array([_integers(c) for c in labels], pa.int64())
  except pa.ArrowException:
    return none, f'of type {kind} with other than whole numbers below 2**63'
  return labels.fill_null(-1).to_numpy(), ''


def _integers(numbers: pa.Array) -> pa.Array:
  """Converts to int64, NaN to null; raises ArrowInvalid for other fractions."""
  if pa.types.is_floating(numbers.type):
    numbers = numbers.cast(pa.float64())
    numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
  return numbers.cast(pa.int64())


def _caption_problem(schema: pa.Schema, name: str) -> str:
  """Returns the type of a caption column that holds no text, or else ''."""
  if schema.names.count(name) != 1:
    return ''
  kind = _plain_type(schema.field(name).type)
  item = _plain_type(kind.value_type) if _is_list(kind) else kind
  readable = _is_text(item) or _is_bytes(item) or pa.types.is_null(item)
  return '' if readable else str(kind)


def _captions(batch: pa.RecordBatch, name: str, problem: str) -> pa.Array:
  """Returns captions as unchecked UTF-8, b'' if missing; lists become lines."""
  if problem or batch.schema.names.count(name) != 1:
    return pa.array([b''] * len(batch), pa.binary())
  captions = _plain(batch[name])
  if not _is_list(captions.type):
    return captions.cast(pa.binary()).fill_null(b'')
  rows = [
    [x.encode() if isinstance(x, str) else x for x in row or () if x]
    for row in captions.to_pylist()
  ]
  return pa.array([b'\n'.join(row) for row in rows], pa.binary())


def _declared_classes(schema: pa.Schema, label: str) -> int:
  """Returns the number of classes in Hugging Face's metadata, or 0."""
  try:
    notes = json.loads(schema.metadata[b'huggingface'])
    return len(notes['info']['features'][label]['names'])
  except (KeyError, TypeError, ValueError):
    return 0


def _note(table: pa.Table, name: str) -> str:
  """Returns a note about the Parquet file that its copy keeps."""
  return table.schema.metadata[name.encode()].decode()


def _num_classes(table: pa.Table) -> int:
  """Returns the declared number of classes, else the largest label plus one."""
  declared = int(_note(table, 'num_classes'))
  largest = pc.max(table['label']).as_py()
  return declared or 1 + (-1 if largest is None else largest)


def _valid(table: pa.Table) -> np.ndarray:
  """Returns the indices of the rows with an image, int64."""
  good = pc.and_(pc.is_valid(table['image']), pc.invert(table['failed']))
  return np.flatnonzero(good.to_numpy())


def _missing(table: pa.Table) -> pa.ChunkedArray:
  """Returns whether each row lacks its image although no download failed."""
  return pc.and_(pc.is_null(table['image']), pc.invert(table['failed']))


@functools.lru_cache(4_096)  # A map keeps no file open, so many may be cached.
def _open_copy(path: str) -> pa.Table:
  """Maps a copy into memory."""
  with pa.memory_map(path) as file, pa.ipc.open_file(file) as reader:
    return reader.read_all()
