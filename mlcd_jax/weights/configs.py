"""Converts configs of vision towers to attributes of models and back."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax.numpy as jnp

from mlcd_jax import models
from mlcd_jax.models import resnet
from mlcd_jax.models import vit
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import fields
from mlcd_jax.weights import open_clip
from mlcd_jax.weights import resnets

# The activations of config.json and their names here.
ACTIVATIONS = {
  'gelu': 'gelu',
  'quick_gelu': 'quick_gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
}

# The values of fields that config.json leaves out, as in transformers 5.23.
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
# The family and the defaults of each model_type.
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

# Fields with only one supported value.
_FIXED = {
  'num_channels': 3,
  'qkv_bias': True,
  'vision_use_head': True,
  'num_key_value_groups': 1,
  'quantization_config': None,
  'per_layer_config': None,
  'pruned_heads': {},
}
_ROPE = {'rope_theta': 1e4, 'rope_type': 'axial'}
_ROPE_FIELDS = ('rope_parameters', 'rope_scaling', 'rope_theta', 'head_dim')

# Model types whose towers have sections of their own in config.json.
_COMPOSITE = ('clip', 'siglip')

# The lowest and highest values that a model may have. Values far outside come
# from a damaged file.
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
  'vocab_size': (1, 16_777_216),
  'max_position_embeddings': (1, 65_536),
}

# The attributes of a ViT that its family decides.
_OF_FAMILY = {
  'clip': dict(pooling='class_token', pre_norm=True),
  'open_clip': dict(pooling='class_token', pre_norm=True),
  'mlcd': dict(pooling='class_token', pre_norm=True, position='rope2d'),
  'siglip': dict(pooling='attention', patch_bias=True),
  'dinov2': dict(pooling='class_token', patch_bias=True, layer_scale=True),
}

# The RGB mean and standard deviation of each family, for folders without a
# preprocessor_config.json.
PIXELS = {
  'clip': (vit.CLIP_MEAN, vit.CLIP_STD),
  'open_clip': (vit.CLIP_MEAN, vit.CLIP_STD),
  'mlcd': (vit.CLIP_MEAN, vit.CLIP_STD),
  'siglip': ((0.5,) * 3, (0.5,) * 3),
  'dinov2': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def path_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of a folder's config, of `transformers` or OpenCLIP.

  OpenCLIP's folders on the hub have both configs. OpenCLIP's counts if the
  folder has weights in its layout only.
  """
  path, theirs = folder / 'config.json', folder / open_clip.NAME
  weights = ('model.safetensors', 'model.safetensors.index.json')
  if path.is_file() and (
    any((folder / name).is_file() for name in weights)
    or not (folder / open_clip.WEIGHTS).is_file()
  ):
    return path
  return theirs if theirs.is_file() else path


def read(folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """Reads the config of a folder's vision tower.

  Returns:
    The family, and the fields of the tower with defaults filled in, named as in
    `transformers`.

  Raises:
    UserError: there is no config, or its tower is not supported.
  """
  path = path_of(folder)
  if path.name == open_clip.NAME:
    family, config = 'open_clip', open_clip.read(path)
  else:
    family, config = _read_transformers(path)
  check_sizes(path, config)
  if family == 'mlcd':
    _check_rope(path, config)
  return family, config


def check_sizes(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises UserError if a size or the activation of a tower is impossible.

  Args:
    path: the file that errors name.
    config: the fields of the tower, with defaults filled in.
  """
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
  if str(config['hidden_act']) not in ACTIVATIONS:
    raise errors.UserError(
      f'{path}: hidden_act={config["hidden_act"]!r} is unknown; use one of: '
      + ', '.join(ACTIVATIONS)
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a config.json.

  Raises:
    UserError: it is missing, not an object, or names its architectures wrongly.
  """
  if not path.is_file():
    raise errors.UserError(
      f'{path.parent}: no config.json; name a folder as transformers writes it'
    )
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise errors.UserError(f'{path}: not an object')
  names = config.get('architectures') or []
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise errors.UserError(f'{path}: architectures={names!r} are no names')
  return config


def tower(
  path: pathlib.Path,
  config: Mapping[str, Any],
  name: str,
  defaults: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the fields of one tower in a config.json, and no others.

  CLIP's `vision_config_dict` and `text_config_dict` override `vision_config`
  and `text_config` entirely: a field they leave out has its default (CLIPConfig
  in transformers).

  Args:
    path: the file that errors name.
    config: the content of the file.
    name: vision or text.
    defaults: the default of every field to return.

  Raises:
    UserError: a field has a value that is not supported.
  """
  sections = {}
  for key in (f'{name}_config', f'{name}_config_dict'):
    sections[key] = config.get(key)
    if not isinstance(sections[key] or {}, dict):
      raise errors.UserError(f'{path}: {key} is not an object')
  section, whole = sections.values()
  composite = config['model_type'] in _COMPOSITE or section is not None
  found = (section or {}) if composite else config
  if composite:
    fields.check_fixed(path, config, _FIXED)
    known = {*_FIXED, *fields.CONFIG, 'vision_config'}
    if config['model_type'] == 'clip':
      known |= {'vision_config_dict', 'text_config_dict'}
    fields.report_unknown(path, config, known)
  if config['model_type'] == 'clip' and whole is not None:
    complete = {**defaults, **whole}
    other = [k for k in defaults if k in found and found[k] != complete[k]]
    if other:
      fields.say(
        f'{path}: {name}_config_dict is used, which says otherwise than '
        f'{name}_config about: ' + ', '.join(other)
      )
    found = found | complete
  fields.check_fixed(path, found, _FIXED)
  known = {*defaults, *_FIXED, *fields.CONFIG, *_ROPE_FIELDS}
  fields.report_unknown(path, found, known)
  return {key: found.get(key, value) for key, value in defaults.items()} | {
    key: found[key] for key in _ROPE_FIELDS if key in found
  }


def _read_transformers(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """Returns the family and the vision tower's fields in a config.json.

  Sizes are not checked yet.
  """
  config = read_json(path)
  model_type = str(config.get('model_type'))
  if model_type not in _TYPES:
    raise errors.UserError(
      f'{path}: model_type={model_type!r} is unknown; use one of: '
      + ', '.join(_TYPES)
    )
  family, defaults = _TYPES[model_type]
  found = tower(path, config, 'vision', defaults)
  found['hidden_act'] = str(found['hidden_act'])
  return family, found | {
    'architectures': config.get('architectures') or [],
    'projection_dim': config.get('projection_dim', 512),  # CLIPConfig.
  }


def _check_rope(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises UserError unless the rotations are those of models/positions.py."""
  # The older name wins if it is set (transformers, modeling_rope_utils.py).
  rope = config.get('rope_scaling') or config.get('rope_parameters') or {}
  if not isinstance(rope, dict):
    raise errors.UserError(f'{path}: rope_parameters is not an object')
  kind = rope.get('rope_type', rope.get('type', 'axial'))
  rope = {
    'rope_theta': rope.get('rope_theta', config.get('rope_theta', 1e4)),
    'rope_type': 'axial' if kind == 'default' else kind,
  }
  fields.check_fixed(path, rope, _ROPE)
  width, heads = config['hidden_size'], config['num_attention_heads']
  if config.get('head_dim') and config['head_dim'] * heads != width:
    raise errors.UserError(
      f'{path}: head_dim={config["head_dim"]!r} is not supported, only '
      'hidden_size / num_attention_heads'
    )


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
  """Makes the model that a config describes.

  Args:
    family: the family from `read`.
    config: the config from `read`.
    embedding_dim: the width of the projection; 0 = none.
    mean: the RGB mean to subtract, for values in 0 .. 1.
    std: the RGB standard deviation to divide by, for values in 0 .. 1.
    dtype: the type of the operands of products.
    scan_layers: compile one block and loop over it, see vit.ViT.
  """
  width, activation = config['hidden_size'], config['hidden_act']
  registers = config.get('num_register_tokens', 0) if family == 'dinov2' else 0
  if 'mlp_ratio' in config:
    mlp_dim = int(width * config['mlp_ratio'])
  else:
    mlp_dim = config['intermediate_size']
  activation = ACTIVATIONS[activation]
  # DINOv2's code takes two thirds, rounded up to a multiple of 8.
  if config.get('use_swiglu_ffn'):
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
    # transformers antialiases positions only in Dinov2WithRegisters.
    antialias='num_register_tokens' in config,
    norm_epsilon=config['layer_norm_eps'],
    mean=tuple(mean),
    std=tuple(std),
    dtype=jnp.dtype(dtype),
    scan_layers=scan_layers,
  )


def from_model(model: models.Encoder) -> tuple[str, dict[str, Any]]:
  """Returns the family of a model and the content of its config.json.

  Raises:
    UserError: `transformers` has no class for the model.
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
