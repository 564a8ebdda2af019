"""From encoded bytes to RGB uint8 [H, W, 3] of the size a model takes."""

import math

import cv2
import numpy as np
from PIL import Image

# Range of width / height of training crops, as OneVision-Encoder's loader
# (dataloader/data_v2.py), the closest published recipe.
_ASPECT_RATIO = (0.8, 1.25)

# The input pipeline parallelises over images; OpenCV's own threads would only
# compete with it.
cv2.setNumThreads(1)


class BadImage(Exception):
  """The bytes are not an image that can be decoded; the text says why."""


def decode(image: bytes) -> np.ndarray:
  """Decodes to RGB uint8 [H, W, 3]; grey is repeated, EXIF ignored.

  Raises:
    BadImage: with one of a few fixed reasons, so that they can be counted.
  """
  if not image:
    raise BadImage('empty')
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
  except cv2.error:
    pixels = None
  if pixels is None:
    raise BadImage('undecodable')
  return pixels


def random_resized_crop(
  pixels: np.ndarray,
  size: int,
  rng: np.random.Generator,
  *,
  area: tuple[float, float],
  flip: bool,
) -> np.ndarray:
  """Crops a random rectangle and resizes it to uint8 [size, size, 3].

  Args:
    pixels: uint8 [H, W, 3].
    size: side of the result in pixels.
    rng: source of the crop's position and shape.
    area: smallest and largest share of the image that is kept.
    flip: mirror every second result.
  """
  height, width = pixels.shape[:2]
  kept = height * width * rng.uniform(*area)
  ratio = math.exp(rng.uniform(*map(math.log, _ASPECT_RATIO)))
  crop_w = min(width, max(1, round(math.sqrt(kept * ratio))))
  crop_h = min(height, max(1, round(math.sqrt(kept / ratio))))
  top = rng.integers(height - crop_h + 1)
  left = rng.integers(width - crop_w + 1)
  crop = pixels[top : top + crop_h, left : left + crop_w]
  crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
  if flip and rng.random() < 0.5:
    crop = crop[:, ::-1]
  return np.ascontiguousarray(crop)


def resize_center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
  """Resizes the shorter side to `size`, then crops the center, as CLIP does.

  Bicubic with antialiasing (Pillow): features depend on it.
  """
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  scale = size / min(height, width)
  new_w = max(size, round(width * scale))
  new_h = max(size, round(height * scale))
  resized = np.asarray(
    Image.fromarray(pixels).resize((new_w, new_h), Image.Resampling.BICUBIC)
  )
  top, left = (new_h - size) // 2, (new_w - size) // 2
  return np.ascontiguousarray(resized[top : top + size, left : left + size])
