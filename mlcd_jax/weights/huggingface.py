"""Reads released vision towers: Hugging Face's and OpenCLIP's folders."""

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
    dtype: of the products; the weights are float32.
    scan_layers: see vit.ViT.
    field: what to call the path in errors.

  Returns:
    A model, and variables with which model.apply(variables, images) encodes
    uint8 images [B, H, W, 3].

  Raises:
    UserError: the folder is not complete or not of those families; tensors
      that are missing, extra or misshapen are listed.
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
  """As `from_huggingface`, with the parameters one at a time.

  Returns:
    The model, and of every parameter its path and its float32 array.
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
  """Shapes and types of a model's parameters, without making any."""
  side = model.image_size
  return jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
  )['params']


def shapes(model: models.Encoder) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter by path."""
  flat = flax.traverse_util.flatten_dict(abstract_params(model), sep='/')
  return {path: x.shape for path, x in flat.items()}


def _embedding_dim(
  reader: tensors.Reader, family: str, config: dict[str, Any]
) -> int:
  """Width of the projection; one that is announced must be there."""
  if family == 'open_clip':
    return config['projection_dim']
  if layouts.PROJECTION in reader.names():
    return reader.shape(layouts.PROJECTION)[0]
  announced = {'CLIPModel', 'CLIPVisionModelWithProjection'}
  if announced & set(config.get('architectures') or ()):
    return config.get('projection_dim', 512)
  return 0
