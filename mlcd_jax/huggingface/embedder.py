"""Any vision tower of `convert` as the embedder."""

import pathlib

from mlcd_jax import convert
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import model_embedder
from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import folders
from mlcd_jax.huggingface import open_clip
from mlcd_jax.huggingface import preprocessing
from mlcd_jax.huggingface import tensors

_FIELD = 'embed.path'


class Huggingface(model_embedder.ModelEmbedder):
  """Unit rows of the projected output, or else of the pooled one."""

  def __init__(
    self, path: str, *, image_size: int, batch_size: int, dtype: str
  ):
    """Loads the weights onto this host's devices.

    Args:
      path: a folder, or ORG/NAME[@REVISION].
      image_size: S; 0 = the checkpoint's own.
      batch_size: images per device.
      dtype: of the products.

    Raises:
      UserError: see `convert.from_huggingface`.
    """
    folder = folders.resolve(path, _FIELD)
    family, config = configs.read(folder)
    prepare = preprocessing.read(folder, family, config['image_size']).at(
      image_size
    )
    model, variables = convert.from_huggingface(folder, dtype=dtype)
    if prepare.image_size < model.patch_size:
      raise errors.UserError(
        f'embed.image_size={prepare.image_size} is less than a patch of '
        f'{_FIELD}={path}, {model.patch_size}'
      )
    super().__init__(
      model,
      variables,
      prepare,
      image_size=prepare.image_size,
      batch_size=batch_size,
    )


def pin(path: str, field: str = _FIELD) -> dict[str, object]:
  """What says which weights a path stands for now.

  Args:
    path: a folder, or ORG/NAME[@REVISION].
    field: what to call it in errors.

  Returns:
    path: with its commit if it is a name; weights: digest of every file.
  """
  path = folders.pinned(path, field)
  return {'path': path, 'weights': _digests(folders.resolve(path, field))}


def check(pinned: dict[str, object]) -> None:
  """Raises UserError if the weights are not those that were pinned."""
  folder = folders.resolve(pinned['path'], _FIELD)
  if _digests(folder) != pinned['weights']:
    raise errors.UserError(
      f'{_FIELD}={pinned["path"]}: the files are not those the embeddings '
      'were made with; put those back, or use another --workdir'
    )


def _digests(folder: pathlib.Path) -> dict[str, str]:
  names = ('config.json', open_clip.NAME, preprocessing.NAME)
  paths = [folder / name for name in names]
  paths += tensors.safetensors_files(folder)
  return {p.name: files.sha256(p) for p in paths if p.is_file()}
