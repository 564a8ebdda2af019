"""Embeddings made elsewhere, which are read in place and never copied.

These layouts are found (see `layouts`):
  clip-retrieval: img_emb/img_emb_0.npy, metadata/metadata_0.parquet and
    optionally text_emb/text_emb_0.npy; LAION names the folders also images/,
    texts/ and laion2B-en-metadata/;
  DataComp: x.npz with l14_img and l14_txt, beside x.parquet;
  NumPy: x.npy, and x.parquet or metadata/x.parquet;
  Parquet: x.parquet with a column of lists; the keys are in another column or
    in metadata/x.parquet.
"""

from collections.abc import Sequence
from concurrent import futures
import hashlib
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax import manifests
from mlcd_jax.embed import layouts
from mlcd_jax.embed import parquet_rows
from mlcd_jax.embed import row_files
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import storage

_FIELD = 'embed.path'

# The default array of an .npz: DataComp's image embeddings of CLIP ViT-L/14.
_NPZ_COLUMN = 'l14_img'

# A fingerprint reads 16 blocks of 64 KiB, 1 MiB in all, spread evenly over the
# file.
_BLOCKS = 16
_BLOCK_BYTES = 64 * 2**10


def describe(embed: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the result of an embed stage that points to existing files.

  Args:
    embed: the `embed` section of the config.

  Returns:
    The result to keep in the stage's manifest.

  Raises:
    UserError: there are no embeddings, or a file cannot be used.
  """
  root = _root(embed.path)
  names = storage.walk(root, _FIELD)
  parts = layouts.find(names, root, texts=bool(embed.text_weight))
  layouts.check(parts, names, root)
  rows = _open(root, parts, embed.column, embed.text_weight)
  return {
    'num_records': rows.shape[0],
    'shard_rows': rows.shard_rows,
    'dim': rows.shape[1],
    'bad': {},
    'sha256': {},  # Nothing lies in the stage's own folder.
    'files': _fingerprints(root, parts),
    'root': root,
  }


def open_made(manifest: manifests.Manifest) -> row_files.Sharded:
  """Opens the embeddings of a finished stage after checking their files.

  Raises:
    UserError: a file is new, missing or changed.
  """
  made, config = manifest.result, manifest.config
  root, weight = made['root'], config['embed.text_weight']
  names = storage.walk(root, _FIELD)
  parts = layouts.find(names, root, texts=bool(weight))
  found = _fingerprints(root, parts)
  for name in sorted(found.keys() | made['files'].keys()):
    if found.get(name) != made['files'].get(name):
      raise errors.UserError(
        f'{_join(root, name)}: new, missing or changed since the embed stage '
        f'looked at it; delete {manifest.folder} to make that stage again'
      )
  return _open(root, parts, config['embed.column'], weight)


def _root(path: str) -> str:
  """Returns the folder as a URL or an absolute path.

  The manifest keeps it, and a later run may start in another folder.
  """
  if storage.is_url(path):
    return path.rstrip('/')
  return str(paths.local(path, _FIELD).absolute())


def _open(
  root: str, parts: Sequence[layouts.Part], column: str, weight: float
) -> row_files.Sharded:
  """Opens all files; 16 threads read their headers."""

  def open_one(part):
    rows = _file(_join(root, part.rows), column)
    if not part.text:
      return rows
    texts = _file(_join(root, part.text), _text_column(column))
    return row_files.Mixed(rows, texts, weight)

  with futures.ThreadPoolExecutor(16) as pool:
    shards = list(pool.map(open_one, parts))
  metadata = [p.metadata and _join(root, p.metadata) or None for p in parts]
  return row_files.Sharded(shards, metadata)


def _file(path: str, column: str) -> row_files.RowFile:
  if storage.stat(path, _FIELD).size == 0:
    raise errors.UserError(f'{path}: empty; make it again or take it away')
  if path.endswith('.npy'):
    return row_files.Npy(path)
  if path.endswith('.npz'):
    return row_files.Npz(path, column or _NPZ_COLUMN)
  return parquet_rows.Parquet(path, column)


def _text_column(column: str) -> str:
  """Returns DataComp's name of the text array for an image array."""
  return (column or _NPZ_COLUMN).removesuffix('_img') + '_txt'


def _fingerprints(root: str, parts: Sequence[layouts.Part]) -> dict[str, str]:
  """Returns the fingerprint of every file, by name."""
  names = sorted({name for part in parts for name in part if name})
  with futures.ThreadPoolExecutor(16) as pool:
    digests = pool.map(lambda name: _fingerprint(_join(root, name)), names)
    return dict(zip(names, digests))


def _fingerprint(path: str) -> str:
  """Returns the digest of a file's size and of 1 MiB spread over the file.

  It avoids reading 600 GB: embeddings that were made anew differ everywhere. A
  single row changed by hand may go unnoticed.
  """
  file = storage.stat(path, _FIELD)
  size = file.size
  digest = hashlib.sha256(str(size).encode())
  last = max(0, size - _BLOCK_BYTES)
  for start in np.linspace(0, last, _BLOCKS).astype(int).tolist():
    digest.update(storage.read(file, start, min(_BLOCK_BYTES, size)))
  return digest.hexdigest()


def _join(root: str, name: str) -> str:
  return f'{root}/{name}'
