"""Any vision tower of `convert` as the embedder.

Shapes: B images, S pixels of a side, D features.
"""

import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mlcd_jax import convert
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import folders
from mlcd_jax.huggingface import open_clip
from mlcd_jax.huggingface import preprocessing
from mlcd_jax.huggingface import tensors

_FIELD = 'embed.path'


class Huggingface:
  """Unit rows of the projected output, or else of the pooled one.

  A call is cut into batches of one shape, so that it compiles once, and every
  device of this host runs the same program on its part of them: a row does
  not depend on how many devices there are.

  Attributes:
    image_size: S.
    batch_rows: images of a batch over this host's devices.
    prepare: RGB uint8 [H, W, 3] of any size to uint8 [S, S, 3].
  """

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
    self.prepare = preprocessing.read(folder, family, config['image_size']).at(
      image_size
    )
    self.image_size = self.prepare.image_size
    model, variables = convert.from_huggingface(folder, dtype=dtype)
    if self.image_size < model.patch_size:
      raise errors.UserError(
        f'embed.image_size={self.image_size} is less than a patch of '
        f'{_FIELD}={path}, {model.patch_size}'
      )
    devices = jax.local_devices()
    self.batch_rows = batch_size * len(devices)
    mesh = Mesh(np.asarray(devices), ('batch',))
    self._split = NamedSharding(mesh, PartitionSpec('batch'))
    self._variables = jax.device_put(
      variables, NamedSharding(mesh, PartitionSpec())
    )

    def unit_rows(variables, images):
      rows = model.apply(variables, images)['embedding']
      norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
      return rows / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

    self._encode = jax.jit(
      jax.shard_map(
        unit_rows,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec('batch')),
        out_specs=PartitionSpec('batch'),
      )
    )

  def submit(self, images: np.ndarray) -> jax.Array:
    """Starts on up to `batch_rows` images; the rows come padded."""
    missing = self.batch_rows - len(images)
    images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
    return self._encode(self._variables, jax.device_put(images, self._split))

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """See `embed.Embedder`."""
    parts = [
      images[i : i + self.batch_rows]
      for i in range(0, len(images), self.batch_rows)
    ]
    rows = [np.asarray(self.submit(part))[: len(part)] for part in parts]
    return np.concatenate(rows)


def pin(path: str) -> dict[str, object]:
  """What says which weights a path stands for now.

  Returns:
    path: with its commit if it is a name; weights: digest of every file.
  """
  path = folders.pinned(path, _FIELD)
  return {'path': path, 'weights': _digests(folders.resolve(path, _FIELD))}


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
