"""Image and text encoders in Linen."""

import jax
import jax.numpy as jnp
import ml_collections

from mlcd_jax.models import resnet
from mlcd_jax.models import vit
from mlcd_jax.runtime import errors

Encoder = vit.ViT | resnet.ResNet

# `model` fields that a ResNet ignores, each with the only value it accepts, so
# that no setting is dropped silently.
_OF_VITS = {
  'pooling': 'average',
  'position': 'learned',
  'activation': 'gelu',
  'scan_layers': False,
  'drop_path': 0.0,
}


def make(
  config: ml_collections.ConfigDict,
  batch_sharding: jax.sharding.Sharding | None = None,
) -> Encoder:
  """Makes the encoder that the `model` fields describe.

  Args:
    config: the `model` fields.
    batch_sharding: see `vit.ViT`; ResNets ignore it.

  Raises:
    UserError: the variant is unknown, its patches do not divide the image
      size, or a field has a value that the variant does not support.
  """
  if config.variant in resnet.VARIANTS:
    return _resnet(config)
  name, _, patch = config.variant.partition('/')
  if name not in vit.VARIANTS or not patch.isdigit() or int(patch) < 1:
    raise errors.UserError(
      f'model.variant={config.variant!r}: needs SIZE/PATCH with one of the '
      f'sizes {", ".join(vit.VARIANTS)}; or one of '
      + ', '.join(resnet.VARIANTS)
    )
  if config.image_size % int(patch):
    raise errors.UserError(
      f'model.image_size={config.image_size} is not divisible by the patch '
      f'size of model.variant={config.variant}'
    )
  sizes = vit.VARIANTS[name]
  # 2-D rotations split a head into quarters.
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
    pre_norm=config.pooling == 'class_token',  # As in CLIP.
    remat=config.remat,
    scan_layers=config.scan_layers,
    drop_path=config.drop_path,
    batch_sharding=batch_sharding,
  )


def _resnet(config: ml_collections.ConfigDict) -> resnet.ResNet:
  """Makes a ResNet; see `make`."""
  for field, value in _OF_VITS.items():
    if config[field] != value:
      raise errors.UserError(
        f'model.{field}={config[field]}: model.variant={config.variant} has '
        f'only {value}'
      )
  if config.remat not in resnet.REMAT:
    raise errors.UserError(
      f'model.remat={config.remat}: model.variant={config.variant} has only '
      + ' and '.join(resnet.REMAT)
    )
  model = resnet.ResNet(
    **resnet.VARIANTS[config.variant],
    embedding_dim=config.embedding_dim,
    dtype=jnp.dtype(config.dtype),
    image_size=config.image_size,
    remat=config.remat,
  )
  if config.image_size % model.patch_size:
    raise errors.UserError(
      f'model.image_size={config.image_size} is not divisible by '
      f'{model.patch_size}, by which model.variant={config.variant} shrinks it'
    )
  return model
