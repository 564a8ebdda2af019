"""The encoders that are scored: images in, features out.

Shapes: B images, S pixels of a side, D features.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import Protocol

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import manifests
from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax.embed import embedders
from mlcd_jax.runtime import distributed
from mlcd_jax.weights import hub
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import pinned
from mlcd_jax.weights import text as text_lib

_FIELD = 'evaluate.encoder'

# Side that images are brought to before their pixels serve as features.
_RAW_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Images in, features out.

  Attributes:
    image_size: S.
    encode: this host's images uint8 [b, S, S, 3] of a global batch, its
      sharding.own_rows of the mesh -> float32 [B, D] of all of it, in order.
    prepare: RGB uint8 [H, W, 3] of any size to uint8 [S, S, 3]; shorter side
      and center where not given.
    model: the Linen module, where it is one of the project's.
    params: of the model.
    text_path: a folder or name with a text tower for the model's `embedding`.
    mesh: over which a batch is split.
  """

  image_size: int
  encode: Callable[[np.ndarray], np.ndarray]
  prepare: Callable[[np.ndarray], np.ndarray] | None = None
  model: Any = None
  params: Any = None
  text_path: str = ''
  mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)


class Trained(Protocol):
  """What evaluation needs of a train program."""

  model: models.Encoder
  mesh: Mesh
  abstract_state: Any  # With `encoder`, the parameters to evaluate.

  def init_encoder(self) -> Any:
    """Returns the parameters of an encoder before training."""
    ...


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

  def encode(images):
    batch = sharding.put_batch(mesh, {'image': images})
    return np.asarray(_pooled(params, batch['image'], model=model, mesh=mesh))

  size = image_size or model.image_size
  return Encoder(size, encode, prepare, model, params, mesh=mesh)


# Of all encoders of a model: evaluation within training, and a run's baselines,
# do not compile it again.
@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def _pooled(params, images, *, model, mesh):
  out = model.apply({'params': params}, images)['pooled']
  return jax.lax.with_sharding_constraint(
    out, NamedSharding(mesh, sharding.REPLICATED)
  )


def from_embedder(embedder: embedders.Embedder) -> Encoder:
  """The features that were clustered."""
  mesh = sharding.make_mesh()
  return Encoder(
    embedder.image_size,
    lambda images: sharding.all_rows(mesh, embedder(images)),
    embedder.prepare,
    mesh=mesh,
  )


def raw_pixels() -> Encoder:
  """Pixels in 0 .. 1, at 32 x 32."""
  mesh = sharding.make_mesh()
  return Encoder(
    _RAW_SIZE,
    lambda images: sharding.all_rows(
      mesh, images.reshape(len(images), -1).astype(np.float32) / 255
    ),
    mesh=mesh,
  )


def load(path: str, mesh: Mesh) -> Encoder:
  """Loads `evaluate.encoder`, with the preprocessing that belongs to it.

  Args:
    path: see `hub.find`.
    mesh: over which a batch is split.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  path = hub.pinned(path, _FIELD)
  model, variables, _ = load_lib.load(path, _FIELD)
  params = jax.device_put(
    variables['params'], NamedSharding(mesh, sharding.REPLICATED)
  )
  prepare = load_lib.load_preprocessing(path, _FIELD)
  size = prepare.image_size if prepare else 0
  encoder = from_model(model, params, mesh, prepare=prepare, image_size=size)
  kind, folder = hub.find(path, _FIELD)
  if kind == hub.RELEASED and text_lib.is_there(folder):
    return dataclasses.replace(encoder, text_path=path)
  return encoder


def identity(path: str) -> dict[str, Any]:
  """What says which weights `evaluate.encoder` stands for now."""
  kind, folder = hub.find(path, _FIELD)
  if kind != hub.RUN:
    return distributed.decide('encoder', lambda: pinned.pin(path, _FIELD))
  checkpoints, step = load_lib.checkpoint_of(folder)
  made = manifests.load(checkpoints)
  return {'step': step, 'train': made and made.fingerprint()}
