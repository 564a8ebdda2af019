"""Decodes images to RGB uint8 [H, W, 3], crops them and resizes them."""

from collections.abc import Sequence
import io
import math
import struct

import cv2
import numpy as np
from PIL import Image

# Range of width / height of training crops. It is that of OneVision-Encoder's
# loader (dataloader/data_v2.py), the closest published recipe.
_ASPECT_RATIO = (0.8, 1.25)

# Random rectangles to try before the central one is taken. torchvision's
# RandomResizedCrop and DALI's random_resized_crop try as many.
_ATTEMPTS = 10
# Random numbers for a crop: top, left and flip, and for each attempt area and
# shape.
NUM_DRAWS = 3 + 2 * _ATTEMPTS

# Larger images are bad. Web archives hold images of 169 and 231 Mpixel, which
# take 0.7 GB once decoded.
_MAX_PIXELS = 64_000_000

# Up to this many pixels a resized image is made whole and then cropped. Beyond
# it only the crop is made: an image of 40,000 x 1 would become 8,960,000 x 224,
# which takes 8 GB.
_MAX_RESIZED = 16_000_000

# The radius of Lanczos, the widest of Pillow's filters, in pixels of the larger
# of the two images.
_FILTER_REACH = 3

# The reasons for a bad image. They are few and fixed, so that they can be
# counted.
REASONS = (
  'empty', 'not an image', 'undecodable', 'more than 64 Mpixel', 'missing',
  'unreadable',
)  # fmt: skip
_EMPTY, _NOT_AN_IMAGE, _UNDECODABLE, _TOO_LARGE, MISSING, UNREADABLE = REASONS

_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# libjpeg decodes to 1/k of the size with fewer operations. OpenCV's flags
# IMREAD_REDUCED_COLOR_k would set BGR too; the GRAYSCALE ones are only the bits
# of the size.
_REDUCED = {
  1: _COLOR,
  2: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_2,
  4: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_4,
  8: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_JPEG = b'\xff\xd8'
_PNG = b'\x89PNG\r\n\x1a\n'
# The JPEG markers of frame headers (SOF), which have the size of the image. The
# three others in this range are DHT, JPG and DAC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# The input pipeline decodes many images in parallel, so OpenCV's own threads
# would only compete with it. OpenCV's log does not name the image.
cv2.setNumThreads(1)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(Exception):
  """An image that cannot be used; its text is one of REASONS."""


def decode(image: bytes | BadImage, *, reduce: int = 1) -> np.ndarray:
  """Decodes an image to RGB uint8 [H, W, 3].

  Grey is repeated in three channels, transparent parts are drawn on white, 16
  bits become 8, and an animation gives its first frame. EXIF orientation is
  ignored, as in CLIP.

  Args:
    image: a file in any format that OpenCV decodes, or a BadImage to raise.
    reduce: the divisor of the sides: 1, 2, 4 or 8 for JPEG, 1 for others.

  Raises:
    BadImage: the image cannot be used.
  """
  width, height = read_size(image)
  if width * height > _MAX_PIXELS:
    raise BadImage(_TOO_LARGE)
  # IMREAD_COLOR drops alpha. So it serves only formats without alpha, and BMP
  # and TIFF, whose alpha is ignored.
  with_alpha = not image.startswith((_JPEG, b'BM', b'II*\0', b'MM\0*'))
  flags = cv2.IMREAD_UNCHANGED if with_alpha else _REDUCED[reduce]
  try:
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if pixels is not None and with_alpha:
      pixels = _to_rgb(pixels)
  except cv2.error:
    pixels = None
  if pixels is None or pixels.dtype != np.uint8:
    raise BadImage(_UNDECODABLE)
  return pixels


def read_size(image: bytes | BadImage) -> tuple[int, int]:
  """Returns the (width, height) in the header of an image, without decoding.

  Args:
    image: a file in any format, or a BadImage to raise.

  Raises:
    BadImage: the header is missing, damaged or that of another kind of file.
  """
  if isinstance(image, BadImage):
    raise image
  if not image:
    raise BadImage(_EMPTY)
  # Pillow takes 44 us for the header of a JPEG that decodes in 400 us, so JPEG
  # and PNG are parsed here.
  if image.startswith(_JPEG):
    return _jpeg_size(image)
  if image.startswith(_PNG) and len(image) >= 24:
    return struct.unpack('>II', image[16:24])
  try:
    with Image.open(io.BytesIO(image)) as header:
      return header.size
  except Image.DecompressionBombError as e:
    raise BadImage(_TOO_LARGE) from e
  except Exception as e:  # Pillow raises many types on damaged headers.
    cut = image.startswith((b'RIFF', b'GIF8')) or image[4:8] == b'ftyp'
    raise BadImage(_UNDECODABLE if cut else _NOT_AN_IMAGE) from e


def random_resized_crop(
  image: bytes | BadImage,
  size: int,
  draws: Sequence[float],
  *,
  area: tuple[float, float],
  flip: bool,
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Decodes an image and resizes a random rectangle of it to a square.

  A JPEG whose crop is at least twice as large as the result is decoded at half,
  a quarter or an eighth of its size, which is faster. A crop that is then still
  twice as large is averaged over areas, because bilinear interpolation would
  skip pixels.

  Args:
    image: the encoded image, or a BadImage to raise.
    size: the side length of the result in pixels.
    draws: NUM_DRAWS random numbers in [0, 1) that determine the crop.
    area: the smallest and largest share of the image's area to keep.
    flip: True to mirror half of the crops, chosen by `draws`.
    out: an array uint8 [size, size, 3] for the result, or None for a new one.

  Returns:
    uint8 [size, size, 3].

  Raises:
    BadImage: see `decode`.
  """
  width, height = read_size(image)
  left, top, crop_w, crop_h = crop_box(width, height, draws, area)
  reduce = 1
  if image.startswith(_JPEG):
    while reduce < 8 and min(crop_w, crop_h) >= 2 * reduce * size:
      reduce *= 2
  pixels = decode(image, reduce=reduce)
  top, left = top // reduce, left // reduce
  crop = pixels[
    top : top + max(1, crop_h // reduce), left : left + max(1, crop_w // reduce)
  ]
  if out is None:
    out = np.empty((size, size, 3), np.uint8)
  # INTER_AREA is slower than INTER_LINEAR, so it serves only where pixels would
  # be skipped.
  shrinks = min(crop.shape[:2]) >= 2 * size
  how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  if flip and draws[2] < 0.5:
    cv2.flip(cv2.resize(crop, (size, size), interpolation=how), 1, dst=out)
  else:
    cv2.resize(crop, (size, size), dst=out, interpolation=how)
  return out


def crop_box(
  width: int,
  height: int,
  draws: Sequence[float],
  area: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Returns a random rectangle as (left, top, width, height) in pixels.

  Area and shape are drawn until the rectangle fits into the image, so that no
  crop is smaller than `area` allows. If none of ten fits, it is the largest
  central rectangle of an allowed shape. This is the distribution of
  torchvision's RandomResizedCrop.

  Args:
    width: the width of the image.
    height: the height of the image.
    draws: NUM_DRAWS random numbers in [0, 1).
    area: the smallest and largest share of the image's area to keep.
  """
  low, high = area
  low_shape, high_shape = map(math.log, _ASPECT_RATIO)
  for share, shape in zip(draws[3:NUM_DRAWS:2], draws[4:NUM_DRAWS:2]):
    kept = height * width * (low + (high - low) * share)
    ratio = math.exp(low_shape + (high_shape - low_shape) * shape)
    crop_w = max(1, round(math.sqrt(kept * ratio)))
    crop_h = max(1, round(math.sqrt(kept / ratio)))
    if crop_w <= width and crop_h <= height:
      top = int((height - crop_h + 1) * draws[0])
      left = int((width - crop_w + 1) * draws[1])
      return left, top, crop_w, crop_h
  narrowest, widest = _ASPECT_RATIO
  crop_w = min(width, max(1, round(height * widest)))
  crop_h = min(height, max(1, round(width / narrowest)))
  return (width - crop_w) // 2, (height - crop_h) // 2, crop_w, crop_h


def resize_center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
  """Resizes the shorter side to `size`, then crops the center, as CLIP does.

  It uses Pillow's bicubic filter with antialiasing, as CLIP does, because the
  features of pretrained encoders depend on the filter.

  Args:
    pixels: uint8 [H, W, 3].
    size: the side length S of the result.

  Returns:
    uint8 [S, S, 3].
  """
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  scale = size / min(height, width)
  new_w = max(size, round(width * scale))
  new_h = max(size, round(height * scale))
  start = (new_h - size) // 2, (new_w - size) // 2
  return resize_crop(pixels, (new_h, new_w), size, start)


def resize_crop(
  pixels: np.ndarray,
  shape: tuple[int, int],
  size: int,
  start: tuple[int, int],
  resample: int = Image.Resampling.BICUBIC,
  *,
  largest: int = _MAX_RESIZED,
) -> np.ndarray:
  """Resizes an image with Pillow's antialiasing, then crops a square.

  If the resized image would be very large, only the crop is made, from the
  pixels that it depends on. Its values differ by rounding only.

  Args:
    pixels: uint8 [H, W, 3].
    shape: the (height, width) of the resized image.
    size: the side length of the square.
    start: the (top, left) of the square in the resized image.
    resample: the number of Pillow's filter.
    largest: the number of pixels up to which the resized image is made whole.
      Up to 8 * size**2 pixels, it is made whole in any case.

  Returns:
    uint8 [size, size, 3].
  """
  if math.prod(shape) <= max(largest, 8 * size**2):
    image = Image.fromarray(pixels).resize(shape[::-1], resample)
    resized, (top, left) = np.asarray(image), start
    return np.ascontiguousarray(resized[top : top + size, left : left + size])
  window = [
    _window(begin, size, new, old)
    for begin, new, old in zip(start, shape, pixels.shape)
  ]
  (first_y, last_y, top, bottom), (first_x, last_x, left, right) = window
  needed = Image.fromarray(pixels[first_y:last_y, first_x:last_x])
  box = (left, top, right, bottom)
  return np.asarray(needed.resize((size, size), resample, box))


def _window(
  begin: int, size: int, new: int, old: int
) -> tuple[int, int, float, float]:
  """Returns the pixels of a side that a part of the resized side depends on.

  Args:
    begin: the first pixel of the part.
    size: the number of pixels of the part.
    new: the number of pixels of the resized side.
    old: the number of pixels of the original side.

  Returns:
    (first, last, low, high). The original pixels from `first` up to, not
    including, `last` are needed. The part lies between `low` and `high`, in
    original pixels counted from `first`.
  """
  low, high = begin * old / new, min(old, (begin + size) * old / new)
  reach = math.ceil(_FILTER_REACH * max(1, old / new)) + 1  # One for rounding.
  first, last = max(0, int(low) - reach), min(old, math.ceil(high) + reach)
  return first, last, low - first, high - first


def _jpeg_size(image: bytes) -> tuple[int, int]:
  """Returns the (width, height) in the frame header of a JPEG.

  Raises:
    BadImage: there is no frame header.
  """
  position = 2
  while position + 9 <= len(image):
    marker, kind, length = struct.unpack_from('>BBH', image, position)
    if marker != 0xFF:
      break
    if kind == 0xFF:  # Padding before a marker.
      position += 1
    elif kind in _JPEG_FRAMES:
      height, width = struct.unpack_from('>HH', image, position + 5)
      return width, height
    else:
      position += 2 + length
  raise BadImage(_UNDECODABLE)


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
  """Converts grey, BGR or BGRA pixels of 8 or 16 bits to RGB of 8 bits."""
  if pixels.dtype == np.uint16:
    pixels = (pixels >> 8).astype(np.uint8)
  if pixels.ndim == 2:
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
  if pixels.shape[2] == 3:
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
  alpha = pixels[:, :, 3:].astype(np.uint16)
  color = pixels[:, :, 2::-1].astype(np.uint16)
  # Blend with white; adding 127 rounds to the nearest integer.
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
