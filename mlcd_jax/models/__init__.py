"""Encoders."""

import jax.numpy as jnp
import ml_collections

from mlcd_jax import errors
from mlcd_jax.models import vit


def make(config: ml_collections.ConfigDict) -> vit.ViT:
  """Makes the encoder that the `model` fields describe.

  Raises:
    UserError: unknown variant, or an image size its patches do not divide.
  """
  name, _, patch = config.variant.partition('/')
  if name not in vit.VARIANTS or not patch.isdigit() or int(patch) < 1:
    known = ', '.join(vit.VARIANTS)
    raise errors.UserError(
      f'model.variant={config.variant!r}: needs SIZE/PATCH with one of the '
      f'sizes {known}'
    )
  if config.image_size % int(patch):
    raise errors.UserError(
      f'model.image_size={config.image_size} is not divisible by the patch '
      f'size of model.variant={config.variant}'
    )
  sizes = vit.VARIANTS[name]
  if config.position == 'rope2d' and sizes['width'] // sizes['heads'] % 4:
    raise errors.UserError(
      f'model.position=rope2d needs heads whose width 4 divides, which those '
      f'of model.variant={config.variant} are not'
    )
  return vit.ViT(
    **sizes,
    patch_size=int(patch),
    embedding_dim=config.embedding_dim,
    pooling=config.pooling,
    dtype=jnp.dtype(config.dtype),
    image_size=config.image_size,
    position=config.position,
    activation=config.activation,
    pre_norm=config.pooling == 'class_token',  # CLIP's extra norm.
    remat=config.remat,
    scan_layers=config.scan_layers,
    drop_path=config.drop_path,
  )
