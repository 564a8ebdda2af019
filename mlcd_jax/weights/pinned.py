"""Which weights a path stands for now, to be compared later."""

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
    path: see `hub.find`.
    field: what to call it in errors.

  Returns:
    `path`, with its commit if it is a name, and `weights`, the digest of every
    file; what `pin_run` returns if it is a run's.
  """
  path = hub.pinned(path, field)
  kind, folder = hub.find(path, field)
  if kind == hub.RUN:
    return pin_run(path)
  load_lib.load_preprocessing(path, field)  # Finds mistakes in the configs.
  return {'path': path, 'weights': _digests(kind, folder)}


def check(pinned: dict[str, object], field: str) -> None:
  """Raises UserError if the weights are not those that were pinned."""
  path = pinned['path']
  if not pin(path, field).items() <= pinned.items():
    raise errors.UserError(
      f'{field}={path}: the files are not those the embeddings were made '
      'with; put those back, or use another --workdir'
    )


def pin_run(path: str) -> dict[str, Any]:
  """Identifies the weights of the run in a workdir.

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
  """Returns the SHA-256 of parameters, with their names, in hexadecimal."""
  hasher = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    hasher.update(jax.tree_util.keystr(path).encode())
    hasher.update(np.ascontiguousarray(leaf))
  return hasher.hexdigest()


def _digests(kind: str, folder: pathlib.Path) -> dict[str, str]:
  if kind == hub.IMPORTED:
    paths = load_lib.imported_files(folder)
  else:
    names = ('config.json', open_clip.NAME, preprocessing.NAME)
    paths = {folder / name for name in names} | {preprocessing.path_of(folder)}
    open_clips = configs.path_of(folder).name == open_clip.NAME
    paths |= set(tensors.safetensors_files(folder, open_clip=open_clips))
  return {p.name: files.sha256(p) for p in sorted(paths) if p.is_file()}
