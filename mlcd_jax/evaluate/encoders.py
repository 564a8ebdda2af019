"""The encoders that are scored; an encoder turns images into features.

Shapes: B images, S pixels per side, D features. Upper case is global, lower
case this host's part.
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

# Pixels per side of the `raw` baseline: 32 * 32 * 3 = 3,072 features.
_RAW_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder with the preprocessing of its images.

  Attributes:
    image_size: S.
    encode: images uint8 [b, S, S, 3] -> features float32 [B, D]. It takes the
      rows of a global batch that `sharding.own_rows` gives to this host, and
      returns the features of the whole batch, in order, on every host.
    prepare: RGB uint8 [H, W, 3] of any size -> uint8 [S, S, 3]. None resizes
      the shorter side to S and crops the center.
    model: the Linen module; None if the features come from no such model.
    params: the parameters of the model.
    text_path: a path or hub name with a text tower that matches the model's
      `embedding`; '' if there is none.
    mesh: the mesh whose devices split a batch.
  """

  image_size: int
  encode: Callable[[np.ndarray], np.ndarray]
  prepare: Callable[[np.ndarray], np.ndarray] | None = None
  model: Any = None
  params: Any = None
  text_path: str = ''
  mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)


class Trained(Protocol):
  """The part of a train program that the evaluation uses."""

  model: models.Encoder
  mesh: Mesh
  abstract_state: Any  # The parameters to evaluate are in its `encoder`.

  def init_encoder(self) -> Any:
    """Returns the initial parameters of the encoder, from before training."""
    ...


def from_model(
  model: Any,
  params: Any,
  mesh: Mesh,
  *,
  prepare: Callable[[np.ndarray], np.ndarray] | None = None,
  image_size: int = 0,
) -> Encoder:
  """Makes an encoder that returns the pooled features of a model.

  Args:
    model: a Linen module that returns a dict with `pooled` [B, D].
    params: the parameters of the model.
    mesh: the mesh whose devices split a batch.
    prepare: see `Encoder`.
    image_size: S; 0 takes the model's own.
  """

  def encode(images):
    batch = sharding.put_batch(mesh, {'image': images})
    return np.asarray(_pooled(params, batch['image'], model=model, mesh=mesh))

  size = image_size or model.image_size
  return Encoder(size, encode, prepare, model, params, mesh=mesh)


# At module level, so that all encoders of one model share the compiled code:
# those of each evaluation inside training, and a run's random baseline.
@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def _pooled(params, images, *, model, mesh):
  """Returns the pooled features [B, D] on every device."""
  out = model.apply({'params': params}, images)['pooled']
  return jax.lax.with_sharding_constraint(
    out, NamedSharding(mesh, sharding.REPLICATED)
  )


def from_embedder(embedder: embedders.Embedder) -> Encoder:
  """Makes an encoder from the embedder whose embeddings were clustered."""
  mesh = sharding.make_mesh()
  return Encoder(
    embedder.image_size,
    lambda images: sharding.all_rows(mesh, embedder(images)),
    embedder.prepare,
    mesh=mesh,
  )


def raw_pixels() -> Encoder:
  """Makes an encoder whose features are the pixels at 32 x 32, from 0 to 1."""
  mesh = sharding.make_mesh()
  return Encoder(
    _RAW_SIZE,
    lambda images: sharding.all_rows(
      mesh, images.reshape(len(images), -1).astype(np.float32) / 255
    ),
    mesh=mesh,
  )


def load(path: str, mesh: Mesh) -> Encoder:
  """Loads `evaluate.encoder` with its own preprocessing.

  Args:
    path: the path or hub name; see `hub.find`.
    mesh: the mesh whose devices split a batch.

  Raises:
    UserError: there is no encoder at the path, or it is incomplete.
  """
  # The functions below each resolve the name; all must get the same commit.
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
  """Identifies the weights at `evaluate.encoder`, for later comparison.

  Args:
    path: the path or hub name; see `hub.find`.

  Returns:
    The step and the train stage's fingerprint if the path is a run's, as for
    the run's own encoder. Otherwise what `pinned.pin` returns.
  """
  kind, folder = hub.find(path, _FIELD)
  if kind != hub.RUN:
    return distributed.decide('encoder', lambda: pinned.pin(path, _FIELD))
  checkpoints, step = load_lib.checkpoint_of(folder)
  made = manifests.load(checkpoints)
  return {'step': step, 'train': made and made.fingerprint()}
