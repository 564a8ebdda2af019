"""Any encoder that `folders.find` finds as the embedder."""

import functools
import pathlib

import jax.numpy as jnp

from mlcd_jax.data import transforms
from mlcd_jax.embed import encoder
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import open_clip
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import tensors

_FIELD = 'embed.path'


class Huggingface(encoder.ModelEmbedder):
  """Unit rows of the projected output, or else of the pooled one."""

  def __init__(
    self, path: str, *, image_size: int, batch_size: int, dtype: str
  ):
    """Loads the weights onto this host's devices.

    Args:
      path: see `folders.find`.
      image_size: S; 0 = the checkpoint's own.
      batch_size: images per device.
      dtype: of the products.

    Raises:
      UserError: see `encoders.load`.
    """
    model, variables, _ = load_lib.load(path, _FIELD)
    prepare = load_lib.load_preprocessing(path, _FIELD)
    if prepare:
      prepare = prepare.at(image_size)
      size = prepare.image_size
    else:
      size = image_size or model.image_size
      prepare = functools.partial(transforms.resize_center_crop, size=size)
    if size < model.patch_size:
      raise errors.UserError(
        f'embed.image_size={size} is less than a patch of '
        f'{_FIELD}={path}, {model.patch_size}'
      )
    super().__init__(
      model.clone(dtype=jnp.dtype(dtype)),
      variables,
      prepare,
      image_size=size,
      batch_size=batch_size,
    )


def pin(path: str, field: str = _FIELD) -> dict[str, object]:
  """What says which weights a path stands for now.

  Args:
    path: see `folders.find`.
    field: what to call it in errors.

  Returns:
    path: with its commit if it is a name; weights: digest of every file. Of a
    run what `model_embedder.pin` returns.
  """
  path = hub.pinned(path, field)
  kind, folder = hub.find(path, field)
  if kind == hub.RUN:
    return encoder.pin(path)
  load_lib.load_preprocessing(path, field)  # Finds mistakes in the configs.
  return {'path': path, 'weights': _digests(kind, folder)}


def check(pinned: dict[str, object]) -> None:
  """Raises UserError if the weights are not those that were pinned."""
  path = pinned['path']
  if not pin(path).items() <= pinned.items():
    raise errors.UserError(
      f'{_FIELD}={path}: the files are not those the embeddings were made '
      'with; put those back, or use another --workdir'
    )


def _digests(kind: str, folder: pathlib.Path) -> dict[str, str]:
  if kind == hub.IMPORTED:
    paths = load_lib.imported_files(folder)
  else:
    names = ('config.json', open_clip.NAME, preprocessing.NAME)
    paths = {folder / name for name in names} | {preprocessing.path_of(folder)}
    open_clips = configs.path_of(folder).name == open_clip.NAME
    paths |= set(tensors.safetensors_files(folder, open_clip=open_clips))
  return {p.name: files.sha256(p) for p in sorted(paths) if p.is_file()}
