"""The encoders that are scored: images in, features out.

Shapes: B images, S pixels of a side, D features.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import checkpoint
from mlcd_jax import embed
from mlcd_jax import encoders
from mlcd_jax import manifests
from mlcd_jax import paths
from mlcd_jax import sharding
from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import embedder as huggingface
from mlcd_jax.huggingface import folders
from mlcd_jax.huggingface import preprocessing
from mlcd_jax.huggingface import text as huggingface_text

_FIELD = 'evaluate.encoder'

# Side that images are brought to before their pixels serve as features.
_RAW_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Images in, features out.

  Attributes:
    image_size: S.
    encode: this host's images uint8 [b, S, S, 3] of a global batch ->
      float32 [B, D] of all of it.
    prepare: RGB uint8 [H, W, 3] of any size to uint8 [S, S, 3]; shorter side
      and center where not given.
    model: the Linen module, where it is one of the project's.
    params: of the model.
    text_path: a folder or name with a text tower for the model's `embedding`.
  """

  image_size: int
  encode: Callable[[np.ndarray], np.ndarray]
  prepare: Callable[[np.ndarray], np.ndarray] | None = None
  model: Any = None
  params: Any = None
  text_path: str = ''


def from_model(
  model: Any,
  params: Any,
  mesh: Mesh,
  *,
  prepare: Callable[[np.ndarray], np.ndarray] | None = None,
  image_size: int = 0,
) -> Encoder:
  """Pooled features of one of the project's models.

  Args:
    model: returns a dict with `pooled`.
    params: of the model.
    mesh: over which a batch is split.
    prepare: see `Encoder`.
    image_size: S; the model's own where 0.
  """

  @jax.jit
  def pooled(params, images):
    out = model.apply({'params': params}, images)['pooled']
    return jax.lax.with_sharding_constraint(
      out, NamedSharding(mesh, sharding.REPLICATED)
    )

  def encode(images):
    batch = sharding.put_batch(mesh, {'image': images})
    return np.asarray(pooled(params, batch['image']))

  size = image_size or model.image_size
  return Encoder(size, encode, prepare, model, params)


def from_embedder(embedder: embed.Embedder) -> Encoder:
  """The features that were clustered."""
  return Encoder(
    embedder.image_size,
    lambda images: all_hosts(embedder(images)),
    embedder.prepare,
  )


def raw_pixels() -> Encoder:
  """Pixels in 0 .. 1, at 32 x 32."""
  return Encoder(
    _RAW_SIZE,
    lambda images: all_hosts(
      images.reshape(len(images), -1).astype(np.float32) / 255
    ),
  )


def load(path: str, mesh: Mesh) -> Encoder:
  """Loads `evaluate.encoder`, with the preprocessing that belongs to it.

  Args:
    path: a workdir, a folder of `convert import` or of `transformers`, or
      ORG/NAME[@REVISION].
    mesh: over which a batch is split.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  model, variables, _ = encoders.load(path, _FIELD)
  params = jax.device_put(
    variables['params'], NamedSharding(mesh, sharding.REPLICATED)
  )
  if not _is_released(path):
    return from_model(model, params, mesh)
  folder = folders.resolve(path, _FIELD)
  family, config = configs.read(folder)
  prepare = preprocessing.read(folder, family, config['image_size']).at(0)
  encoder = from_model(
    model, params, mesh, prepare=prepare, image_size=prepare.image_size
  )
  if not huggingface_text.is_there(folder):
    return encoder
  return dataclasses.replace(encoder, text_path=path)


def identity(path: str) -> dict[str, Any]:
  """What says which weights `evaluate.encoder` stands for now."""
  folder = paths.local(path)
  if (folder / 'checkpoints').is_dir():
    made = manifests.load(folder / 'checkpoints')
    return {
      'step': checkpoint.latest_step(folder / 'checkpoints'),
      'train': made and made.fingerprint(),
    }
  return huggingface.pin(path, _FIELD)


def _is_released(path: str) -> bool:
  """Whether it is a checkpoint in the layout of `transformers`."""
  folder = paths.local(path)
  return not (
    (folder / 'checkpoints').is_dir() or (folder / 'model.json').is_file()
  )


def all_hosts(rows: np.ndarray) -> np.ndarray:
  """Joins every host's rows of a global batch, in order."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)
