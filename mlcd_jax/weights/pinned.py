"""Identifies the weights behind a path, so that later changes are noticed."""

from collections.abc import Mapping
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import open_clip
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import tensors


def pin(path: str, field: str) -> dict[str, object]:
  """Identifies the weights at a path, for later comparison.

  Args:
    path: any path or name that `hub.find` accepts.
    field: the name of the config field, for errors.

  Returns:
    For a run the result of `pin_run`. Otherwise `path`, with the commit if it
    is a name on the hub, and `weights`, the SHA-256 of each file by name.

  Raises:
    UserError: there is no encoder, or its configs are wrong.
  """
  path = hub.pinned(path, field)
  kind, folder = hub.find(path, field)
  if kind == hub.RUN:
    return pin_run(path)
  # Reports mistakes in the configs before the digests take their time.
  load_lib.load_preprocessing(path, field)
  return {'path': path, 'weights': _digests(kind, folder)}


def check(pinned: dict[str, object], field: str) -> None:
  """Raises UserError if the weights at a path have changed since `pin`.

  Args:
    pinned: the result of `pin`; it may have further keys.
    field: the name of the config field, for errors.
  """
  path = pinned['path']
  # A subset: manifests keep further notes in the same dict.
  if not pin(path, field).items() <= pinned.items():
    raise errors.UserError(
      f'{field}={path}: the files are not those the embeddings were made '
      'with; put those back, or use another --workdir'
    )


def pin_run(path: str) -> dict[str, Any]:
  """Identifies the weights of a run.

  Args:
    path: a workdir, whose last checkpoint counts, or one of its checkpoints.

  Returns:
    `path` (absolute), `step`, and `sha256`, the digest of the parameters.

  Raises:
    UserError: nothing is trained there.
  """
  workdir = paths.local(path).absolute()
  _, params, found = load_lib.from_run(workdir)
  return {
    'path': str(workdir),
    'step': found['step'],
    'sha256': digest(params),
  }


def digest(params: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of parameters and their names, in hexadecimal."""
  hasher = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    # With the names, so that two swapped parameters are noticed.
    hasher.update(jax.tree_util.keystr(path).encode())
    hasher.update(np.ascontiguousarray(leaf))
  return hasher.hexdigest()


def _digests(kind: str, folder: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of all files that define an encoder, by file name.

  Args:
    kind: hub.IMPORTED or hub.RELEASED.
    folder: the folder of the encoder.
  """
  if kind == hub.IMPORTED:
    paths = load_lib.imported_files(folder)
  else:
    names = ('config.json', open_clip.NAME, preprocessing.NAME)
    paths = {folder / name for name in names} | {preprocessing.path_of(folder)}
    # The weights that `huggingface.from_huggingface` would read.
    open_clips = configs.path_of(folder).name == open_clip.NAME
    paths |= set(tensors.safetensors_files(folder, open_clip=open_clips))
  return {p.name: files.sha256(p) for p in sorted(paths) if p.is_file()}
