"""Images as a checkpoint's preprocessor_config.json wants them."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import open_clip

NAME = 'preprocessor_config.json'

_BICUBIC = int(Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """RGB uint8 [H, W, 3] to uint8 [S, S, 3], by Pillow's antialiased filters.

  Attributes:
    image_size: S.
    shorter_side: pixels it is resized to before the center is cropped; 0 =
      height and width are both resized to S.
    resample: Pillow's number of the filter.
    mean: of RGB in 0 .. 1; the model subtracts it.
    std: of RGB in 0 .. 1; the model divides by it.
  """

  image_size: int
  shorter_side: int
  resample: int
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, pixels: np.ndarray) -> np.ndarray:
    """Resizes and crops one image."""
    height, width = pixels.shape[:2]
    size, short = self.image_size, self.shorter_side
    if short:  # The longer side is cut off, as torchvision does.
      long = int(short * max(height, width) / min(height, width))
      new_h, new_w = (short, long) if height <= width else (long, short)
    else:
      new_h = new_w = size
    if (new_h, new_w) != (height, width):
      image = Image.fromarray(pixels).resize((new_w, new_h), self.resample)
      pixels = np.asarray(image)
    top, left = (new_h - size) // 2, (new_w - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])

  def at(self, image_size: int) -> 'Preprocessing':
    """The same for another size; 0 = as it is."""
    if not image_size or image_size == self.image_size:
      return self
    shorter = math.ceil(self.shorter_side * image_size / self.image_size)
    return dataclasses.replace(
      self, image_size=image_size, shorter_side=shorter
    )


def read(folder: pathlib.Path, family: str, image_size: int) -> Preprocessing:
  """Reads a folder's preprocessing.

  Args:
    folder: of the checkpoint.
    family: whose preprocessing it is where the folder says nothing.
    image_size: in that case.

  Raises:
    UserError: it asks for what is not done here.
  """
  path, reads = folder / NAME, _read
  if family == 'open_clip' and not path.is_file():
    path, reads = folder / open_clip.NAME, _read_open_clip
  if not path.is_file():
    shorter = 0 if family == 'siglip' else image_size
    pixels = configs.PIXELS[family]
    return Preprocessing(image_size, shorter, _BICUBIC, *pixels)
  try:
    found = reads(path, family, image_size)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(
      f'{path}: not as such files are written ({type(e).__name__}: {e})'
    ) from e
  if not 1 <= found.image_size <= 16_384 or found.shorter_side > 16_384:
    raise errors.UserError(f'{path}: sizes are outside 1 to 16384')
  for name, values in (('mean', found.mean), ('std', found.std)):
    if len(values) != 3 or not all(0 <= x < 1_000 for x in values):
      raise errors.UserError(f'{path}: {name}={values} is no RGB in 0 .. 1')
  if min(found.std) == 0:
    raise errors.UserError(f'{path}: std={found.std} divides by zero')
  return found


def _read_open_clip(
  path: pathlib.Path, family: str, image_size: int
) -> Preprocessing:
  """What an OpenCLIP config says."""
  del family
  config = open_clip.read(path)
  mean, std = (tuple(map(float, config[f'image_{x}'])) for x in ('mean', 'std'))
  return Preprocessing(image_size, image_size, _BICUBIC, mean, std)


def _read(path: pathlib.Path, family: str, image_size: int) -> Preprocessing:
  """What a preprocessor_config.json says."""
  mean, std = configs.PIXELS[family]
  config = files.read_json(path)
  crops = config.get('do_center_crop') and config.get('crop_size')
  size, shorter = _sides(
    path,
    config.get('size', image_size),
    config.get('crop_size') if crops else None,
    square=family == 'siglip',
  )
  for name, wanted in (
    ('do_resize', True),
    ('do_rescale', True),
    ('do_normalize', True),
  ):
    if config.get(name, wanted) != wanted:
      raise errors.UserError(f'{path}: {name}={config[name]} is not supported')
  if abs(config.get('rescale_factor', 1 / 255) * 255 - 1) > 1e-6:
    raise errors.UserError(
      f'{path}: rescale_factor={config["rescale_factor"]} is not supported, '
      'only 1 / 255'
    )
  return Preprocessing(
    image_size=size,
    shorter_side=shorter,
    resample=int(Image.Resampling(config.get('resample', _BICUBIC))),
    mean=tuple(map(float, config.get('image_mean', mean))),
    std=tuple(map(float, config.get('image_std', std))),
  )


def to_json(image_size: int, mean: Any, std: Any) -> dict[str, Any]:
  """The preprocessor_config.json of a model of this project."""
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


def _sides(
  path: pathlib.Path, size: Any, crop: Any, *, square: bool
) -> tuple[int, int]:
  """Returns (image_size, shorter_side)."""
  if isinstance(size, int):  # Of files before 2022.
    size = {'height': size, 'width': size} if square else {
      'shortest_edge': size
    }  # fmt: skip
  if isinstance(crop, int):
    crop = {'height': crop, 'width': crop}
  final = crop or size
  if 'height' not in final or final['height'] != final.get('width'):
    raise errors.UserError(
      f'{path}: size={size}, crop_size={crop} give no square images, which '
      'are all that is supported'
    )
  side = final['height']
  shorter = size.get('shortest_edge', 0)
  if 'height' in size and (size['height'], size['width']) != (side, side):
    raise errors.UserError(
      f'{path}: size={size} before crop_size={crop} is not supported'
    )
  if shorter and shorter < side:
    raise errors.UserError(
      f'{path}: crop_size={side} is more than shortest_edge={shorter}'
    )
  return side, shorter
