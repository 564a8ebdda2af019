"""Reads and applies the image preprocessing of released checkpoints."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image

from mlcd_jax.data import transforms
from mlcd_jax.models import vit
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import configs
from mlcd_jax.weights import fields
from mlcd_jax.weights import open_clip

NAME = 'preprocessor_config.json'
# transformers 5 writes the same fields to the field `image_processor` of this
# file when it saves a whole processor, with its tokenizer for example.
_PROCESSOR = 'processor_config.json'

_BICUBIC = int(Image.Resampling.BICUBIC)
_BILINEAR = int(Image.Resampling.BILINEAR)

_MOST = 16_384  # The most pixels of a side, as for image_size in configs.py.

# The defaults of the image processors of transformers 5.23 that take the same
# steps as `Preprocessing`, by the start of their names.
_CLIP = dict(
  do_resize=True,
  size={'shortest_edge': 224},
  default_to_square=False,
  resample=_BICUBIC,
  do_center_crop=True,
  crop_size={'height': 224, 'width': 224},
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=vit.CLIP_MEAN,
  image_std=vit.CLIP_STD,
)
_SIGLIP = _CLIP | dict(
  size={'height': 224, 'width': 224},
  do_center_crop=False,
  image_mean=(0.5,) * 3,
  image_std=(0.5,) * 3,
)
_CLASSES = {
  'CLIP': _CLIP,
  'Bit': _CLIP,
  'Siglip': _SIGLIP,
  'ViT': _SIGLIP | dict(resample=_BILINEAR, default_to_square=True),
}
_CLASS = re.compile(
  rf'({"|".join(_CLASSES)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)'
)
# The class of each family, for files that name none.
_OF_FAMILY = {
  'clip': 'CLIP',
  'mlcd': 'CLIP',
  'siglip': 'Siglip',
  'dinov2': 'Bit',
}

# Fields with only one supported value.
_FIXED = {
  'do_rescale': True,
  'do_normalize': True,
  'do_pad': False,
  'pad_size': None,
  'size_divisor': None,
  'use_square_size': False,
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """A function that resizes RGB uint8 [H, W, 3] to uint8 [S, S, 3].

  It uses Pillow's antialiased filters.

  Attributes:
    image_size: S, the side of the result in pixels.
    shorter_side: the length of the shorter side after resizing, in pixels; then
      the center is cropped. 0 = both sides are resized to S without a crop.
    resample: the number of the filter in Pillow.
    mean: the RGB mean that the model subtracts, for values in 0 .. 1.
    std: the RGB standard deviation that the model divides by.
    rounded: start a crop at the even pixel if its exact start is between two
      pixels, as torchvision does for OpenCLIP. Otherwise it starts at the
      first of the two, as in transformers.
  """

  image_size: int
  shorter_side: int
  resample: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  rounded: bool = False

  def __call__(self, pixels: np.ndarray) -> np.ndarray:
    """Resizes and crops one image, uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    size, short = self.image_size, self.shorter_side
    if short:  # Like torchvision, int() rounds the longer side down.
      long = int(short * max(height, width) / min(height, width))
      new_h, new_w = (short, long) if height <= width else (long, short)
    else:
      new_h = new_w = size
    if (new_h, new_w) == (size, size) == (height, width):
      return pixels
    start = self._start(new_h - size), self._start(new_w - size)
    return transforms.resize_crop(
      pixels, (new_h, new_w), size, start, self.resample
    )

  def _start(self, surplus: int) -> int:
    """Returns the first pixel of a crop that drops `surplus` pixels."""
    # round() rounds halves to the even number.
    return round(surplus / 2) if self.rounded else surplus // 2

  def at(self, image_size: int) -> 'Preprocessing':
    """Returns the preprocessing for another image size.

    Args:
      image_size: S in pixels; 0 = unchanged.
    """
    if not image_size or image_size == self.image_size:
      return self
    shorter = math.ceil(self.shorter_side * image_size / self.image_size)
    return dataclasses.replace(
      self, image_size=image_size, shorter_side=shorter
    )


def path_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file with the preprocessing of a folder of transformers.

  This is processor_config.json if it has the field `image_processor`, as
  transformers 5 writes it. Earlier versions used that file for other fields.
  """
  path = folder / _PROCESSOR
  if path.is_file() and _content(path).get('image_processor') is not None:
    return path
  return folder / NAME


def read(folder: pathlib.Path, family: str, image_size: int) -> Preprocessing:
  """Reads the preprocessing of a checkpoint.

  Args:
    folder: the folder of the checkpoint.
    family: the family of the checkpoint. It decides the preprocessing if the
      folder has no file for it.
    image_size: the image size of the model, for the same case.

  Raises:
    UserError: the file is damaged or asks for steps that are not supported.
  """
  path, reads = path_of(folder), _read
  if family == 'open_clip':
    path, reads = folder / open_clip.NAME, _read_open_clip
  if not path.is_file():
    fields.say(f"{folder}: no {NAME}; its family's own preprocessing is used")
    shorter = 0 if family == 'siglip' else image_size
    pixels = configs.PIXELS[family]
    return Preprocessing(image_size, shorter, _BICUBIC, *pixels)
  try:
    found = reads(path, family)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(
      f'{path}: not as such files are written ({type(e).__name__}: {e})'
    ) from e
  if not 1 <= found.image_size <= _MOST or found.shorter_side > _MOST:
    raise errors.UserError(f'{path}: sizes are outside 1 to {_MOST}')
  for name, values in (('mean', found.mean), ('std', found.std)):
    if len(values) != 3 or not all(0 <= x < 1_000 for x in values):
      raise errors.UserError(f'{path}: {name}={values} is no RGB in 0 .. 1')
  if min(found.std) == 0:
    raise errors.UserError(f'{path}: std={found.std} divides by zero')
  return found


def _content(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that must hold an object."""
  content = files.read_json(path)
  if not isinstance(content, dict):
    raise errors.UserError(f'{path}: not an object')
  return content


def _read_open_clip(path: pathlib.Path, family: str) -> Preprocessing:
  """Reads the preprocessing of an open_clip_config.json."""
  del family  # Has the signature of `_read`.
  config = open_clip.read(path)
  size = config['image_size']
  return Preprocessing(
    image_size=size,
    shorter_side=0 if config['resize_mode'] == 'squash' else size,
    resample=_BILINEAR if config['interpolation'] == 'bilinear' else _BICUBIC,
    mean=config['image_mean'],
    std=config['image_std'],
    rounded=True,
  )


def _read(path: pathlib.Path, family: str) -> Preprocessing:
  """Reads the preprocessing of a file of transformers.

  Args:
    path: the file, as `path_of` returns it.
    family: the family of the checkpoint, for a file that names no class.

  Raises:
    UserError: the file asks for steps that are not supported.
  """
  config = _content(path)
  if path.name == _PROCESSOR:
    config = config['image_processor']
  defaults = _CLASSES[_class(path, config, family)]
  fields.check_fixed(path, config, _FIXED)
  fields.refuse_unknown(path, config, {*defaults, *_FIXED, *fields.PROCESSOR})
  config = defaults | config  # In transformers null is off.
  if not config['do_resize']:
    raise errors.UserError(
      f'{path}: do_resize=False gives no square images, which are all that is '
      'supported'
    )
  if abs(config['rescale_factor'] * 255 - 1) > 1e-6:
    raise errors.UserError(
      f'{path}: rescale_factor={config["rescale_factor"]} is not supported, '
      'only 1 / 255'
    )
  if config['resample'] not in list(Image.Resampling):
    raise errors.UserError(
      f'{path}: resample={config["resample"]!r} is none of '
      + ', '.join(f'{r.value} ({r.name.lower()})' for r in Image.Resampling)
    )
  size, shorter = _sides(
    path,
    _size(path, 'size', config['size'], square=config['default_to_square']),
    _size(path, 'crop_size', config['crop_size'], square=True)
    if config['do_center_crop']
    else None,
  )
  return Preprocessing(
    image_size=size,
    shorter_side=shorter,
    resample=int(config['resample']),
    mean=tuple(map(float, config['image_mean'])),
    std=tuple(map(float, config['image_std'])),
  )


def _class(path: pathlib.Path, config: Mapping[str, Any], family: str) -> str:
  """Returns the key in _CLASSES of the class that a file names.

  Raises:
    UserError: the class is not supported.
  """
  for field in ('image_processor_type', 'feature_extractor_type'):
    if config.get(field) is not None:
      match = _CLASS.fullmatch(str(config[field]))
      if not match:
        raise errors.UserError(
          f'{path}: {field}={config[field]!r} is not supported, only '
          + ', '.join(f'{name}ImageProcessor' for name in _CLASSES)
        )
      return match[1]
  return _OF_FAMILY[family]


def to_json(image_size: int, mean: Any, std: Any) -> dict[str, Any]:
  """Returns the content of preprocessor_config.json for a model trained here.

  Args:
    image_size: the side of the images in pixels.
    mean: the RGB mean to subtract, for values in 0 .. 1.
    std: the RGB standard deviation to divide by, for values in 0 .. 1.
  """
  return {
    'image_processor_type': 'CLIPImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': image_size},
    'resample': _BICUBIC,
    'do_center_crop': True,
    'crop_size': {'height': image_size, 'width': image_size},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'do_convert_rgb': True,
    'image_mean': list(mean),
    'image_std': list(std),
  }


def _size(
  path: pathlib.Path, name: str, size: Any, *, square: bool
) -> dict[str, int]:
  """Returns a size as {shortest_edge} or {height, width}.

  Args:
    path: the file that errors name.
    name: the field that errors name.
    size: the value of the field: an integer, a list or a dict.
    square: an integer is the length of both sides, not of the shortest edge.

  Raises:
    UserError: the size is none of these, or outside 1 to _MOST.
  """
  found = size
  if isinstance(size, int):  # Files before 2022 have integers.
    found = (
      {'height': size, 'width': size} if square else {'shortest_edge': size}
    )
  elif isinstance(size, list) and len(size) == 2:
    found = dict(zip(('height', 'width'), size))
  elif isinstance(size, dict):
    found = {k: v for k, v in size.items() if v is not None}
  if (
    not isinstance(found, dict)
    or set(found) not in ({'shortest_edge'}, {'height', 'width'})
    or not all(type(v) is int and 1 <= v <= _MOST for v in found.values())
  ):
    raise errors.UserError(
      f'{path}: {name}={size!r} is not supported, only height and width or '
      f'shortest_edge, of 1 to {_MOST} pixels'
    )
  return found


def _sides(
  path: pathlib.Path, size: dict[str, int], crop: dict[str, int] | None
) -> tuple[int, int]:
  """Returns (image_size, shorter_side), as in `Preprocessing`.

  Args:
    path: the file that errors name.
    size: the size to resize to, a result of `_size`.
    crop: the size to crop to, likewise; None = no crop.

  Raises:
    UserError: the images would not be squares, or the crop is too large.
  """
  final = crop or size
  if any(
    'height' not in sides or sides['height'] != sides['width']
    for sides in ([final] if 'shortest_edge' in size else [final, size])
  ):
    raise errors.UserError(
      f'{path}: size={size}, crop_size={crop} give no square images, which '
      'are all that is supported'
    )
  side = final['height']
  shorter = size.get('shortest_edge', 0)
  if not shorter and size['height'] != side:
    raise errors.UserError(
      f'{path}: size={size} before crop_size={crop} is not supported'
    )
  if shorter and shorter < side:
    raise errors.UserError(
      f'{path}: crop_size={side} is more than shortest_edge={shorter}'
    )
  return side, shorter
