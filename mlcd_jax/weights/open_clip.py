"""Reads and writes OpenCLIP's configs, and writes timm's."""

import pathlib
from typing import Any

from mlcd_jax.models import vit
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import fields

NAME = 'open_clip_config.json'
WEIGHTS = 'open_clip_model.safetensors'

# The layouts that an export can write.
LAYOUTS = ('transformers', 'open_clip', 'timm')

# The values of fields that vision_cfg leaves out (OpenCLIP 3.3, CLIPVisionCfg).
_DEFAULTS = dict(
  layers=12,
  width=768,
  head_width=64,
  mlp_ratio=4.0,
  patch_size=16,
  image_size=224,
)
# Fields of vision_cfg that change the model, each with the only value that is
# supported.
_FIXED = dict(pool_type='tok', pos_embed_type='learnable')
_PIXELS = ('mean', 'std', 'interpolation', 'resize_mode')
# The supported values of two fields of preprocess_cfg, each with the default
# first. With `random` OpenCLIP varies the filter in training only; elsewhere it
# is bicubic.
_INTERPOLATIONS = ('bicubic', 'bilinear', 'random')
_RESIZE_MODES = ('shortest', 'squash')


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads open_clip_config.json and renames its fields as in `transformers`.

  Args:
    path: the file.

  Returns:
    Fields by name; image_mean, image_std, interpolation and resize_mode are
    the preprocessing.

  Raises:
    UserError: the file is damaged, or the model is not one of OpenCLIP's own
      ViTs with a class token.
  """
  try:
    content = files.read_json(path)
    model, pixels = content['model_cfg'], content.get('preprocess_cfg', {})
    vision = model['vision_cfg']
    _check_fields(path, model, vision, pixels)
    vision = _DEFAULTS | vision
    return dict(
      hidden_size=vision['width'],
      intermediate_size=int(vision['width'] * vision['mlp_ratio']),
      num_hidden_layers=vision['layers'],
      num_attention_heads=vision['width'] // vision['head_width'],
      image_size=vision['image_size'],
      patch_size=vision['patch_size'],
      hidden_act='quick_gelu' if model.get('quick_gelu') else 'gelu',
      layer_norm_eps=1e-5,  # PyTorch's default, which OpenCLIP keeps.
      projection_dim=model['embed_dim'],
      image_mean=_three(pixels.get('mean') or vit.CLIP_MEAN),
      image_std=_three(pixels.get('std') or vit.CLIP_STD),
      interpolation=pixels.get('interpolation') or _INTERPOLATIONS[0],
      resize_mode=pixels.get('resize_mode') or _RESIZE_MODES[0],
    )
  except (
    LookupError,
    ArithmeticError,
    TypeError,
    ValueError,
    AttributeError,
  ) as e:
    raise errors.UserError(
      f'{path}: not as OpenCLIP writes it ({type(e).__name__}: {e})'
    ) from e


def _check_fields(path, model, vision, pixels) -> None:
  """Raises UserError if a field asks for something that is not supported.

  Args:
    path: the file.
    model: its model_cfg.
    vision: its vision_cfg.
    pixels: its preprocess_cfg.
  """
  fields.check_fixed(path, vision, _FIXED)
  fields.check_fixed(path, pixels, {'mode': 'RGB'})
  fields.refuse_unknown(
    path, vision, {*_DEFAULTS, *_FIXED, *fields.OPEN_CLIP_VISION}
  )
  used = ('embed_dim', 'vision_cfg', 'quick_gelu')
  fields.refuse_unknown(path, model, {*used, *fields.OPEN_CLIP_MODEL})
  # OpenCLIP itself ignores fields of preprocess_cfg that it does not know, so
  # a warning is enough.
  known = {*_PIXELS, 'mode', *fields.OPEN_CLIP_PIXELS}
  fields.report_unknown(path, pixels, known)
  for name, values in (
    ('interpolation', _INTERPOLATIONS),
    ('resize_mode', _RESIZE_MODES),
  ):
    if (pixels.get(name) or values[0]) not in values:
      raise errors.UserError(
        f'{path}: {name}={pixels[name]!r} is not supported; only '
        + ', '.join(values)
      )


def _three(values: Any) -> tuple[float, ...]:
  """Returns three floats: one number counts for all channels."""
  if isinstance(values, (int, float)):
    values = [values] * 3
  return tuple(map(float, values))


def to_open_clip(model: vit.ViT) -> dict[str, Any]:
  """Returns the content of open_clip_config.json for a model.

  Its CLIP class always has a text tower. So the config describes one too, for
  which the export has no weights.

  Raises:
    UserError: OpenCLIP has no such model.
  """
  _check(model, 'OpenCLIP')
  vision = dict(
    image_size=model.image_size,
    layers=model.depth,
    width=model.width,
    head_width=model.width // model.heads,
    mlp_ratio=_mlp_ratio(model),
    patch_size=model.patch_size,
  )
  # The text tower of CLIP's ViT-B models.
  text = dict(context_length=77, vocab_size=49_408, width=512, heads=8)
  return dict(
    model_cfg=dict(
      embed_dim=model.embedding_dim,
      quick_gelu=model.activation == 'quick_gelu',
      vision_cfg=vision,
      text_cfg=text | dict(layers=12),
    ),
    preprocess_cfg=dict(
      mean=model.mean,
      std=model.std,
      interpolation='bicubic',
      resize_mode='shortest',
    ),
  )


def to_timm(model: vit.ViT) -> dict[str, Any]:
  """Returns the content of timm's config.json for a model.

  Raises:
    UserError: timm has no such model.
  """
  _check(model, 'timm')
  classes = model.embedding_dim
  return dict(
    # Any CLIP tower of timm will do: model_args overrides all its sizes.
    architecture='vit_base_patch16_clip_224',
    num_classes=classes,
    num_features=model.width,
    model_args=dict(
      img_size=model.image_size,
      patch_size=model.patch_size,
      embed_dim=model.width,
      depth=model.depth,
      num_heads=model.heads,
      mlp_ratio=_mlp_ratio(model),
      act_layer=model.activation,
    ),
    pretrained_cfg=dict(
      input_size=[3, model.image_size, model.image_size],
      num_classes=classes,
      mean=model.mean,
      std=model.std,
      interpolation='bicubic',
      crop_pct=1.0,
      first_conv='patch_embed.proj',
      classifier='head',
    ),
  )


def _check(model: vit.ViT, name: str) -> None:
  """Raises UserError unless a model is built like CLIP's image tower.

  Args:
    model: the model to export.
    name: the name of the layout in errors.
  """
  if not isinstance(model, vit.ViT):
    raise errors.UserError(
      f'--layout: {name} is written for ViTs only; use --layout=transformers'
    )
  for field, values in {
    'pooling': ('class_token',),
    'position': ('learned',),
    'activation': ('gelu', 'quick_gelu'),
  }.items():
    if getattr(model, field) not in values:
      raise errors.UserError(
        f'model.{field}={getattr(model, field)}: {name} has no such tower, '
        f'only {" and ".join(values)}; use --layout=transformers'
      )


def _mlp_ratio(model: vit.ViT) -> float:
  """Returns a ratio for which int(width * ratio) is the hidden width."""
  ratio = model.mlp_dim / model.width
  # Rounding in the division can lose one, which the added half prevents.
  exact = int(model.width * ratio) == model.mlp_dim
  return ratio if exact else (model.mlp_dim + 0.5) / model.width
