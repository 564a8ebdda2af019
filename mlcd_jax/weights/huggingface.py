"""Loads vision towers from folders of transformers and OpenCLIP."""

from collections.abc import Iterator
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mlcd_jax import models
from mlcd_jax.models import vit
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import layouts
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import tensors


def from_huggingface(
  path: str | pathlib.Path,
  *,
  dtype: str = 'float32',
  scan_layers: bool = False,
  field: str = 'path',
) -> tuple[vit.ViT, dict[str, Any]]:
  """Loads the vision tower of a CLIP, MLCD, SigLIP or DINOv2 checkpoint.

  Args:
    path: a folder as `transformers` or OpenCLIP writes it, or
      ORG/NAME[@REVISION].
    dtype: the type of the operands of products; the weights are float32.
    scan_layers: compile one block and loop over it, see vit.ViT.
    field: the name of the config field or argument, for errors.

  Returns:
    The model and its variables, for model.apply(variables, images) with uint8
    images [B, H, W, 3].

  Raises:
    UserError: the folder is incomplete or of another family. The message lists
      tensors that are missing, extra or misshapen.
  """
  model, parameters = stream_huggingface(
    path, dtype=dtype, scan_layers=scan_layers, field=field
  )
  return model, {'params': tensors.nested(parameters)}


def stream_huggingface(
  path: str | pathlib.Path,
  *,
  dtype: str = 'float32',
  scan_layers: bool = False,
  field: str = 'path',
) -> tuple[vit.ViT, Iterator[tuple[str, np.ndarray]]]:
  """Loads a vision tower, but reads its parameters one at a time.

  So they need not all be in memory. For arguments and errors see
  `from_huggingface`.

  Returns:
    The model, and an iterator of (path, float32 array) over its parameters.
  """
  folder = hub.resolve(str(path), field)
  family, config = configs.read(folder)
  prefix = tensors.OPEN_CLIP_PREFIX if family == 'open_clip' else ''
  reader = tensors.Reader(folder, prefix=prefix)
  pixels = preprocessing.read(folder, family, config['image_size'])
  model = configs.to_model(
    family,
    config,
    embedding_dim=_embedding_dim(reader, family, config),
    mean=pixels.mean,
    std=pixels.std,
    dtype=dtype,
    scan_layers=scan_layers,
  )
  table = layouts.of_images(family, model)
  return model, tensors.stream(reader, table, shapes(model), folder)


def abstract_params(model: models.Encoder) -> dict[str, Any]:
  """Returns the shapes and types of parameters, without making any."""
  side = model.image_size
  return jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
  )['params']


def shapes(model: models.Encoder) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by path."""
  flat = flax.traverse_util.flatten_dict(abstract_params(model), sep='/')
  return {path: x.shape for path, x in flat.items()}


def _embedding_dim(
  reader: tensors.Reader, family: str, config: dict[str, Any]
) -> int:
  """Returns the width of the projection, 0 without one.

  If the config names a class with a projection, the width comes from the config
  even without a tensor, so that the missing tensor is reported.
  """
  if family == 'open_clip':
    return config['projection_dim']
  if layouts.PROJECTION in reader.names():
    return reader.shape(layouts.PROJECTION)[0]
  announced = {'CLIPModel', 'CLIPVisionModelWithProjection'}
  if announced & set(config.get('architectures') or ()):
    return config.get('projection_dim', 512)  # The default of CLIPConfig.
  return 0
