"""Embedding files in clip-retrieval's layout, read as one array.

img_emb/img_emb_00000.npy holds float16 unit rows [n, D], and
metadata/metadata_00000.parquet the key and caption of the same rows.
"""

import bisect
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import io
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import manifests


def row_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's rows; it exists once the shard is whole."""
  return folder / 'img_emb' / f'img_emb_{shard:05d}.npy'


def metadata_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's keys and captions."""
  return folder / 'metadata' / f'metadata_{shard:05d}.parquet'


def write_shard(
  folder: pathlib.Path,
  shard: int,
  *,
  rows: np.ndarray,
  keys: Sequence[str],
  captions: Sequence[str],
  notes: Mapping[str, Any],
) -> None:
  """Writes one shard, the rows last, so that half a shard never counts.

  Args:
    folder: of the layout.
    shard: number.
    rows: [n, D] unit rows.
    keys: [n].
    captions: [n].
    notes: JSON values kept in the metadata's footer, with the rows' sha256.
  """
  npy = io.BytesIO()
  np.save(npy, rows.astype(np.float16), allow_pickle=False)
  digest = hashlib.sha256(npy.getbuffer()).hexdigest()
  table = pa.table(
    {
      'image_path': pa.array(keys, pa.string()),
      'key': pa.array(keys, pa.string()),
      'caption': pa.array(captions, pa.string()),
    }
  )
  footer = json.dumps(dict(notes, sha256=digest))
  table = table.replace_schema_metadata({'mlcd_jax': footer})
  with files.atomic(metadata_path(folder, shard)) as temporary:
    pq.write_table(table, temporary)
  with files.atomic(row_path(folder, shard)) as temporary:
    temporary.write_bytes(npy.getbuffer())


def read_notes(folder: pathlib.Path, shard: int) -> dict[str, Any]:
  """Returns what `write_shard` was given as notes, and 'sha256'."""
  path = metadata_path(folder, shard)
  schema = _read_parquet(path, pq.read_schema)
  return json.loads(schema.metadata[b'mlcd_jax'])


def open_made(manifest: manifests.Manifest) -> 'Embeddings':
  """Opens what a finished embed stage wrote, checked against its manifest.

  Raises:
    UserError: a shard is missing, has other keys or another number of rows.
  """
  made = manifest.result
  files.check_sha256(
    manifest.folder,
    {k: v for k, v in made['sha256'].items() if k.startswith('metadata/')},
  )
  found = Embeddings(manifest.folder, len(made['shard_rows']))
  for shard, (rows, expected) in enumerate(
    zip(found.shard_rows, made['shard_rows'])
  ):
    if rows != expected:
      raise errors.UserError(
        f'{row_path(manifest.folder, shard)}: {rows} rows, {expected} were '
        f'made; delete {manifest.folder} to make that stage again'
      )
  return found


class Embeddings:
  """All shards of a folder as one array [N, D], read by slices.

  Attributes:
    shape: (N, D).
    shard_rows: rows of each shard.
  """

  def __init__(self, folder: pathlib.Path, num_shards: int):
    """Opens the shards.

    Args:
      folder: of the layout.
      num_shards: they are numbered from 0.

    Raises:
      UserError: one is missing, broken, or does not fit the others.
    """
    self._folder = folder
    self._paths = [row_path(folder, shard) for shard in range(num_shards)]
    shards = [files.read_npy(path) for path in self._paths]
    self._dtype, dim = shards[0].dtype, shards[0].shape[-1]
    for path, rows in zip(self._paths, shards):
      if rows.ndim != 2 or rows.shape[1] != dim:
        raise errors.UserError(
          f'{path}: shape {rows.shape}, but {self._paths[0]} has {dim} columns'
        )
    self.shard_rows = [len(rows) for rows in shards]
    self._starts = np.concatenate([[0], np.cumsum(self.shard_rows)]).tolist()
    self.shape = (self._starts[-1], dim)

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    parts = [np.zeros((0, self.shape[1]), self._dtype)]
    shard = bisect.bisect_right(self._starts, start) - 1
    while start < stop:
      first = self._starts[shard]
      # Mapped anew: what is read through a map counts as this process's
      # memory for as long as the map lives.
      part = files.read_npy(self._paths[shard])[start - first : stop - first]
      parts.append(np.array(part))
      start += len(part)
      shard += 1
    return np.concatenate(parts)

  def locate(self, row: int) -> tuple[pathlib.Path, int]:
    """Returns the file that holds a row, and the row's place in it."""
    shard = bisect.bisect_right(self._starts, row) - 1
    return row_path(self._folder, shard), row - self._starts[shard]

  def keys(self) -> np.ndarray:
    """Returns the key of every row, [N]."""
    return self._column('key')

  def captions(self) -> np.ndarray:
    """Returns the caption of every row, [N]."""
    return self._column('caption')

  def metadata(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
    """Returns keys and captions of some rows, reading only their shards."""
    shards = np.searchsorted(self._starts, rows, side='right') - 1
    keys, captions = [''] * len(rows), [''] * len(rows)
    for shard in np.unique(shards):
      table = _read_parquet(
        metadata_path(self._folder, shard),
        lambda path: pq.read_table(path, columns=['key', 'caption']),
      )
      places = np.flatnonzero(shards == shard)
      taken = table.take(rows[places] - self._starts[shard]).to_pylist()
      for place, row in zip(places, taken):
        keys[place], captions[place] = row['key'], row['caption'] or ''
    return keys, captions

  def _column(self, name: str) -> np.ndarray:
    columns = []
    for shard, rows in enumerate(self.shard_rows):
      path = metadata_path(self._folder, shard)
      column = _read_parquet(path, lambda p: pq.read_table(p, columns=[name]))
      column = column[name]
      if len(column) != rows:
        raise errors.UserError(
          f'{path}: {len(column)} rows, but '
          f'{row_path(self._folder, shard)} has {rows}'
        )
      columns.append(column.to_numpy(zero_copy_only=False).astype(str))
    return np.concatenate(columns)


def _read_parquet(path: pathlib.Path, read: Callable[[pathlib.Path], Any]):
  """Reads with pyarrow; raises UserError naming a broken file."""
  try:
    return read(path)
  except (OSError, KeyError, pa.ArrowException) as e:
    raise errors.UserError(
      f'{path}: cannot be read as Parquet; delete {path.parent.parent} to '
      'make that stage again'
    ) from e
