"""Embedders that are models: Hugging Face checkpoints and trained runs.

Shapes: B images, S pixels of a side, D features.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mlcd_jax import unit
from mlcd_jax.data import transforms
from mlcd_jax.runtime import errors
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import pinned as pinned_lib

_BATCH, _WHOLE = PartitionSpec('batch'), PartitionSpec()

_FIELD = 'embed.path'


class ModelEmbedder:
  """An embedder that returns unit rows of a model's `embedding`.

  A call is split into batches of one shape, so that the model compiles once.
  Every device of this host runs the same program on its part of a batch, so
  that a row does not depend on the number of devices.

  Attributes:
    image_size: S.
    batch_rows: the images of a batch, over all devices of this host.
    prepare: resizes an RGB image uint8 [H, W, 3] to uint8 [S, S, 3].
  """

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    prepare: Callable[[np.ndarray], np.ndarray],
    *,
    image_size: int,
    batch_size: int,
  ):
    """Puts the weights onto this host's devices.

    Args:
      model: maps uint8 [B, S, S, 3] to a dict with `embedding` [B, D].
      variables: the variables of the model.
      prepare: see the class.
      image_size: S.
      batch_size: the number of images per device.
    """
    self.prepare = prepare
    self.image_size = image_size
    devices = jax.local_devices()
    self.batch_rows = batch_size * len(devices)
    mesh = _make_mesh(devices)
    self._split = NamedSharding(mesh, _BATCH)
    self._variables = jax.device_put(variables, NamedSharding(mesh, _WHOLE))
    self._encode = _make_encode(model, mesh)

  def submit(self, images: np.ndarray) -> jax.Array:
    """Starts to embed up to `batch_rows` images; see `embedders.Embedder`.

    Returns:
      [batch_rows, D]; the rows after those of the images are padding.
    """
    missing = self.batch_rows - len(images)
    images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
    return self._encode(self._variables, jax.device_put(images, self._split))

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """See `embedders.Embedder`."""
    parts = [
      images[i : i + self.batch_rows]
      for i in range(0, len(images), self.batch_rows)
    ]
    rows = [np.asarray(self.submit(part))[: len(part)] for part in parts]
    return np.concatenate(rows)


class Huggingface(ModelEmbedder):
  """An embedder from a Hugging Face checkpoint.

  Its rows are the projected output, or the pooled one without a projection.
  """

  def __init__(
    self, path: str, *, image_size: int, batch_size: int, dtype: str
  ):
    """Loads the weights onto this host's devices.

    Args:
      path: see `hub.find`.
      image_size: S, or 0 for the checkpoint's own size.
      batch_size: the number of images per device.
      dtype: the type of the matrix products.

    Raises:
      UserError: see `weights.load.load`.
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


def abstract_call(
  model: nn.Module,
  params: Mapping[str, Any],
  devices: Sequence[jax.Device],
  batch_size: int,
) -> tuple[Any, tuple[Any, Any]]:
  """Returns one call of the embedder without creating any array.

  Args:
    model: the architecture of the embedder.
    params: the shapes and types of its parameters.
    devices: the devices that it runs on.
    batch_size: the number of images per device.

  Returns:
    The jitted function of a call, and its abstract arguments.
  """
  mesh = _make_mesh(devices)
  variables = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, _WHOLE)
    ),
    {'params': params},
  )
  side = model.image_size
  images = jax.ShapeDtypeStruct(
    (batch_size * len(devices), side, side, 3),
    jnp.uint8,
    sharding=NamedSharding(mesh, _BATCH),
  )
  return _make_encode(model, mesh), (variables, images)


def _make_mesh(devices: Sequence[jax.Device]) -> Mesh:
  return Mesh(np.asarray(devices), ('batch',))


def _make_encode(model: nn.Module, mesh: Mesh):
  """Returns the jitted function (variables, images) -> unit rows.

  Each device embeds its part of the images.
  """

  def unit_rows(variables, images):
    return unit.unit_embeddings(model.apply(variables, images)['embedding'])

  return jax.jit(
    jax.shard_map(
      unit_rows, mesh=mesh, in_specs=(_WHOLE, _BATCH), out_specs=_BATCH
    )
  )


def from_checkpoint(
  pinned: Mapping[str, Any], *, image_size: int, batch_size: int, dtype: str
) -> ModelEmbedder:
  """Returns the trained encoder of a run as an embedder.

  Its rows are the classifier's input, normalised.

  Args:
    pinned: the result of `weights.pinned.pin_run`.
    image_size: S, or 0 for the size of the training.
    batch_size: the number of images per device.
    dtype: the type of the matrix products.

  Raises:
    UserError: the checkpoint is not the one that was pinned.
  """
  model, params, found = load_lib.from_run(pathlib.Path(pinned['path']))
  step, digest = found['step'], pinned_lib.digest(params)
  if (step, digest) != (pinned['step'], pinned['sha256']):
    raise errors.UserError(
      f'embed.path={pinned["path"]}: the last checkpoint, {step}, is not the '
      f'one the embeddings were made with, {pinned["step"]}; put that back, or '
      'use another --workdir'
    )
  size = image_size or found['config'].model.image_size
  if size < model.patch_size:
    raise errors.UserError(
      f'embed.image_size={size} is less than a patch of '
      f'embed.path={pinned["path"]}, {model.patch_size}'
    )
  return ModelEmbedder(
    model.clone(dtype=jnp.dtype(dtype)),
    {'params': params},
    functools.partial(transforms.resize_center_crop, size=size),
    image_size=size,
    batch_size=batch_size,
  )
