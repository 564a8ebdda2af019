"""Embedding files in clip-retrieval's layout, read as one array.

img_emb/img_emb_00000.npy holds float16 unit rows [n, D].
metadata/metadata_00000.parquet holds the key and caption of each row.
"""

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

from mlcd_jax import manifests
from mlcd_jax.embed import precomputed
from mlcd_jax.embed import row_files
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files


def row_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """Returns the file of a shard's rows.

  It exists only once the shard is complete; see `write_shard`.
  """
  return folder / 'img_emb' / f'img_emb_{shard:05d}.npy'


def metadata_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """Returns the file of a shard's keys and captions."""
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
  """Writes one shard, the rows last, so that a partial shard never counts.

  Args:
    folder: the folder of the embed stage.
    shard: the number of the shard.
    rows: the unit rows [n, D].
    keys: the key of each row.
    captions: the caption of each row.
    notes: JSON values to keep in the metadata's footer, beside the sha256 of
      the rows.
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
  """Returns the notes given to `write_shard`, and 'sha256' of the rows."""
  schema = _read_schema(metadata_path(folder, shard))
  return json.loads(schema.metadata[b'mlcd_jax'])


def open_made(manifest: manifests.Manifest) -> row_files.Sharded:
  """Opens the embeddings of a finished embed stage after checking them.

  The manifest tells whether the stage wrote them or points to existing files.

  Raises:
    UserError: a shard is missing, has other keys or another number of rows.
  """
  made = manifest.result
  if 'files' in made:
    return precomputed.open_made(manifest)
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


class Embeddings(row_files.Sharded):
  """All shards of a folder as one array; see `row_files.Sharded`."""

  def __init__(self, folder: pathlib.Path, num_shards: int):
    """Opens the shards.

    Args:
      folder: the folder of the embed stage.
      num_shards: the number of shards; they are numbered from 0.

    Raises:
      UserError: a shard is missing, broken or of another width.
    """
    shards = range(num_shards)
    super().__init__(
      [row_files.Npy(str(row_path(folder, shard))) for shard in shards],
      [str(metadata_path(folder, shard)) for shard in shards],
    )


def _read_schema(path: pathlib.Path) -> pa.Schema:
  try:
    with open(path, 'rb') as f:
      return pq.read_schema(f)
  except pa.ArrowException as e:
    raise errors.UserError(
      f'{path}: cannot be read as Parquet; delete {path.parent.parent} to '
      'make that stage again'
    ) from e
