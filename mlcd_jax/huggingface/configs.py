"""config.json of a vision tower to a ViT's attributes, and back."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax.numpy as jnp

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import models
from mlcd_jax.huggingface import open_clip
from mlcd_jax.huggingface import resnets
from mlcd_jax.models import resnet
from mlcd_jax.models import vit

ACTIVATIONS = {
  'gelu': 'gelu',
  'quick_gelu': 'quick_gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
}

# What config.json leaves out is the default of transformers 5.23.
_CLIP = dict(
  hidden_size=768,
  intermediate_size=3_072,
  num_hidden_layers=12,
  num_attention_heads=12,
  image_size=224,
  patch_size=32,
  hidden_act='quick_gelu',
  layer_norm_eps=1e-5,
)
_SIGLIP = _CLIP | dict(
  patch_size=16, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6
)
_MLCD = dict(
  hidden_size=1_664,
  intermediate_size=8_192,
  num_hidden_layers=48,
  num_attention_heads=16,
  image_size=336,
  patch_size=14,
  hidden_act='gelu',
  layer_norm_eps=1e-5,
)
_DINOV2 = dict(
  hidden_size=768,
  mlp_ratio=4,
  num_hidden_layers=12,
  num_attention_heads=12,
  image_size=224,
  patch_size=14,
  hidden_act='gelu',
  layer_norm_eps=1e-6,
  use_swiglu_ffn=False,
)
# model_type -> family and defaults.
_TYPES = {
  'clip': ('clip', _CLIP),
  'clip_vision_model': ('clip', _CLIP),
  'mlcd': ('mlcd', _MLCD),
  'mlcd_vision_model': ('mlcd', _MLCD),
  'siglip': ('siglip', _SIGLIP),
  'siglip_vision_model': ('siglip', _SIGLIP),
  'dinov2': ('dinov2', _DINOV2),
  'dinov2_with_registers': (
    'dinov2',
    _DINOV2 | dict(patch_size=16, num_register_tokens=4),
  ),
}

# What the models here have only one kind of.
_FIXED = {
  'num_channels': 3,
  'qkv_bias': True,
  'vision_use_head': True,
  'num_key_value_groups': 1,
}

# Sizes that models may have; what is far outside is a damaged file.
_RANGES = {
  'hidden_size': (1, 65_536),
  'intermediate_size': (1, 1_048_576),
  'mlp_ratio': (0.01, 100.0),
  'num_hidden_layers': (1, 1_000),
  'num_attention_heads': (1, 1_024),
  'image_size': (1, 16_384),
  'patch_size': (1, 1_024),
  'num_register_tokens': (0, 1_024),
  'projection_dim': (0, 65_536),
  'layer_norm_eps': (1e-12, 1.0),
}

_OF_FAMILY = {
  'clip': dict(pooling='class_token', pre_norm=True),
  'open_clip': dict(pooling='class_token', pre_norm=True),
  'mlcd': dict(pooling='class_token', pre_norm=True, position='rope2d'),
  'siglip': dict(pooling='attention', patch_bias=True),
  'dinov2': dict(pooling='class_token', patch_bias=True, layer_scale=True),
}

# Mean and deviation where there is no preprocessor_config.json.
PIXELS = {
  'clip': (vit.CLIP_MEAN, vit.CLIP_STD),
  'open_clip': (vit.CLIP_MEAN, vit.CLIP_STD),
  'mlcd': (vit.CLIP_MEAN, vit.CLIP_STD),
  'siglip': ((0.5,) * 3, (0.5,) * 3),
  'dinov2': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def read(folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """Returns a folder's family and the vision tower's own config, whole.

  Raises:
    UserError: no config.json, or none of a vision tower known here.
  """
  path = folder / 'config.json'
  if not path.is_file() and (folder / open_clip.NAME).is_file():
    path = folder / open_clip.NAME
    family, config = 'open_clip', open_clip.read(path)
  else:
    family, config = _read_transformers(path)
  for name, (low, high) in _RANGES.items():
    value = config.get(name, low)
    if type(value) not in (int, float) or not low <= value <= high:
      raise errors.UserError(
        f'{path}: {name}={value!r} is no number from {low} to {high}'
      )
    if isinstance(value, float) and isinstance(high, int):
      raise errors.UserError(f'{path}: {name}={value!r} is no whole number')
  if config['hidden_size'] % config['num_attention_heads']:
    raise errors.UserError(
      f'{path}: num_attention_heads={config["num_attention_heads"]} does not '
      f'divide hidden_size={config["hidden_size"]}'
    )
  if config['hidden_act'] not in ACTIVATIONS:
    raise errors.UserError(
      f'{path}: hidden_act={config["hidden_act"]!r} is unknown; use one of: '
      + ', '.join(ACTIVATIONS)
    )
  return family, config


def _read_transformers(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """The family and the vision tower's config in a config.json."""
  if not path.is_file():
    raise errors.UserError(
      f'{path.parent}: no config.json; name a folder as transformers writes it'
    )
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise errors.UserError(f'{path}: not an object')
  model_type = str(config.get('model_type'))
  if model_type not in _TYPES:
    raise errors.UserError(
      f'{path}: model_type={model_type!r} is unknown; use one of: '
      + ', '.join(_TYPES)
    )
  family, defaults = _TYPES[model_type]
  for name in ('vision_config', 'rope_parameters'):
    if not isinstance(config.get(name) or {}, dict):
      raise errors.UserError(f'{path}: {name} is not an object')
  config = defaults | config | (config.get('vision_config') or {})
  config['hidden_act'] = str(config['hidden_act'])
  for name, value in _FIXED.items():
    if config.get(name, value) != value:
      raise errors.UserError(
        f'{path}: {name}={config[name]!r} is not supported, only {value!r}'
      )
  rope = config.get('rope_parameters') or {}
  if rope.get('rope_theta', 1e4) != 1e4:
    raise errors.UserError(
      f'{path}: rope_theta={rope["rope_theta"]} is not supported, only 10000'
    )
  return family, config


def to_model(
  family: str,
  config: Mapping[str, Any],
  *,
  embedding_dim: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: str,
  scan_layers: bool,
) -> vit.ViT:
  """Makes the model of a config.

  Args:
    family: as `read` returned it.
    config: as `read` returned it.
    embedding_dim: of the projection; 0 = none.
    mean: of RGB in 0 .. 1.
    std: of RGB in 0 .. 1.
    dtype: of the products.
    scan_layers: see vit.ViT.
  """
  width, activation = config['hidden_size'], config['hidden_act']
  registers = config.get('num_register_tokens', 0) if family == 'dinov2' else 0
  if 'mlp_ratio' in config:
    mlp_dim = int(width * config['mlp_ratio'])
  else:
    mlp_dim = config['intermediate_size']
  activation = ACTIVATIONS[activation]
  if config.get('use_swiglu_ffn'):  # Rounded as in DINOv2's code.
    mlp_dim = (int(mlp_dim * 2 / 3) + 7) // 8 * 8
    activation = 'swiglu'
  return vit.ViT(
    **_OF_FAMILY[family],
    width=width,
    depth=config['num_hidden_layers'],
    heads=config['num_attention_heads'],
    mlp_dim=mlp_dim,
    patch_size=config['patch_size'],
    image_size=config['image_size'],
    embedding_dim=embedding_dim,
    activation=activation,
    registers=registers,
    # transformers interpolates with it where there are registers only.
    antialias='num_register_tokens' in config,
    norm_epsilon=config['layer_norm_eps'],
    mean=tuple(mean),
    std=tuple(std),
    dtype=jnp.dtype(dtype),
    scan_layers=scan_layers,
  )


def from_model(model: models.Encoder) -> tuple[str, dict[str, Any]]:
  """Returns the family and config.json of a model.

  Raises:
    UserError: no class of `transformers` is such a model.
  """
  if isinstance(model, resnet.ResNet):
    return 'resnet', resnets.to_config(model)
  family = 'mlcd' if model.position == 'rope2d' else 'clip'
  for field, value in _OF_FAMILY[family].items():
    if getattr(model, field) != value:
      raise errors.UserError(
        f'model.{field}={getattr(model, field)}: exported are models with '
        f'{value} only, since transformers has no class for others'
      )
  names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  config = dict(
    architectures=['CLIPVisionModelWithProjection'],
    model_type='clip_vision_model',
    hidden_size=model.width,
    intermediate_size=model.mlp_dim,
    num_hidden_layers=model.depth,
    num_attention_heads=model.heads,
    num_channels=3,
    image_size=model.image_size,
    patch_size=model.patch_size,
    hidden_act=names[model.activation],
    layer_norm_eps=model.norm_epsilon,
    dtype='float32',
  )
  if family == 'mlcd':
    config |= dict(
      architectures=['MLCDVisionModel'],
      model_type='mlcd_vision_model',
      num_key_value_groups=1,
      rope_parameters={'rope_theta': 10_000.0, 'rope_type': 'axial'},
    )
  elif model.embedding_dim:
    config['projection_dim'] = model.embedding_dim
  else:
    config['architectures'] = ['CLIPVisionModel']
  return family, config
