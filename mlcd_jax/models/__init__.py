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
  return vit.ViT(
    **vit.VARIANTS[name],
    patch_size=int(patch),
    embedding_dim=config.embedding_dim,
    pooling=config.pooling,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
    scan_layers=config.scan_layers,
    drop_path=config.drop_path,
  )
