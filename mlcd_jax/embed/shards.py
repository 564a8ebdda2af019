"""Embedding files in clip-retrieval's layout, read as one array.

img_emb/img_emb_00000.npy holds float16 unit rows [n, D].
metadata/metadata_00000.parquet holds the key and caption of each row.

With embed.views the folder views/ beside it holds the views of the images in
the same layout: V consecutive rows for each row of the shard of the same
number, with the image's key and the number of the view.
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


def views_folder(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the views, beside that of the embed stage."""
  return folder.parent / 'views'


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
  columns = {'caption': pa.array(captions, pa.string())}
  _write(folder, shard, rows=rows, keys=keys, columns=columns, notes=notes)


def write_views(
  folder: pathlib.Path,
  shard: int,
  *,
  rows: np.ndarray,
  keys: Sequence[str],
) -> None:
  """Writes the views of the images of one shard; see `write_shard`.

  Args:
    folder: the folder of the views; see `views_folder`.
    shard: the number of the shard.
    rows: the unit rows [n, V, D].
    keys: the keys of the n images.
  """
  num_images, num_views, dim = rows.shape
  numbers = np.tile(np.arange(num_views, dtype=np.int32), num_images)
  _write(
    folder,
    shard,
    rows=rows.reshape(-1, dim),
    keys=[key for key in keys for _ in range(num_views)],
    columns={'view': pa.array(numbers)},
    notes={},
  )


def _write(
  folder: pathlib.Path,
  shard: int,
  *,
  rows: np.ndarray,
  keys: Sequence[str],
  columns: Mapping[str, pa.Array],
  notes: Mapping[str, Any],
) -> None:
  """Writes rows and metadata with further columns; see `write_shard`."""
  npy = io.BytesIO()
  np.save(npy, rows.astype(np.float16, copy=False), allow_pickle=False)
  digest = hashlib.sha256(npy.getbuffer()).hexdigest()
  table = pa.table(
    {
      'image_path': pa.array(keys, pa.string()),
      'key': pa.array(keys, pa.string()),
      **columns,
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


def read_sha256(folder: pathlib.Path, num_shards: int) -> dict[str, str]:
  """Returns the digest of every file of a folder, by its name in there.

  Those of the rows are the ones noted when they were written.
  """
  digests = {}
  for shard in range(num_shards):
    metadata = metadata_path(folder, shard)
    for path, digest in (
      (row_path(folder, shard), read_notes(folder, shard)['sha256']),
      (metadata, files.sha256(metadata)),
    ):
      digests[str(path.relative_to(folder))] = digest
  return digests


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


def open_views(manifest: manifests.Manifest) -> row_files.Sharded:
  """Opens the views of a finished embed stage after checking their files.

  Raises:
    UserError: the stage made no views, or a file is missing or has changed.
  """
  made = manifest.result.get('views')
  if not made:
    raise errors.UserError(
      f'embed.views: {manifest.folder} was made without views; set embed.views '
      'in another --workdir'
    )
  folder = views_folder(manifest.folder)
  files.check_sha256(folder, made['sha256'], manifest.folder)
  return Embeddings(
    folder,
    len(manifest.result['shard_rows']),
    rows_per_image=made['rows_per_image'],
  )


class Embeddings(row_files.Sharded):
  """All shards of a folder as one array; see `row_files.Sharded`."""

  def __init__(
    self, folder: pathlib.Path, num_shards: int, *, rows_per_image: int = 1
  ):
    """Opens the shards.

    Args:
      folder: the folder of the embed stage or of its views.
      num_shards: the number of shards; they are numbered from 0.
      rows_per_image: see `row_files.Sharded`.

    Raises:
      UserError: a shard is missing, broken or of another width.
    """
    shards = range(num_shards)
    super().__init__(
      [row_files.Npy(str(row_path(folder, shard))) for shard in shards],
      [str(metadata_path(folder, shard)) for shard in shards],
      rows_per_image=rows_per_image,
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
