"""From encoded bytes to RGB uint8 [H, W, 3] of the size a model takes."""

from collections.abc import Sequence
import io
import math
import struct

import cv2
import numpy as np
from PIL import Image

# Range of width / height of training crops, as OneVision-Encoder's loader
# (dataloader/data_v2.py), the closest published recipe.
_ASPECT_RATIO = (0.8, 1.25)

# Random numbers a crop takes: area, shape, top, left, flip.
NUM_DRAWS = 5

# Web archives hold images of 169 and 231 Mpixel, 0.7 GB once decoded.
_MAX_PIXELS = 64_000_000

# Pixels up to which a resized image is made whole and then cropped: one of
# 40,000 x 1 would become 8,960,000 x 224, and take 8 GB.
_MAX_RESIZED = 16_000_000

# Of Pillow's filters that of Lanczos reaches furthest, in pixels of the larger
# of the two images.
_FILTER_REACH = 3

# Why an image is bad; few and fixed, so that they can be counted.
REASONS = ('empty', 'not an image', 'undecodable', 'more than 64 Mpixel')
_EMPTY, _NOT_AN_IMAGE, _UNDECODABLE, _TOO_LARGE = REASONS

_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# libjpeg decodes to 1/k of the size in fewer operations. OpenCV's names with
# COLOR have the BGR bit set, these are the bare bits for the size.
_REDUCED = {
  1: _COLOR,
  2: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_2,
  4: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_4,
  8: _COLOR | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_JPEG = b'\xff\xd8'
_PNG = b'\x89PNG\r\n\x1a\n'
# Frame headers (SOF) of JPEG, where its size is.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# The input pipeline parallelises over images; OpenCV's own threads would only
# compete with it. Its log would name no image.
cv2.setNumThreads(1)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(Exception):
  """The bytes are no image that can be used; the text is one of REASONS."""


def decode(image: bytes, *, reduce: int = 1) -> np.ndarray:
  """Decodes to RGB uint8 [H, W, 3].

  Grey is repeated, alpha is composited on white, 16 bits become 8, of an
  animation the first frame counts, and EXIF orientation is ignored, as CLIP
  does.

  Args:
    image: a file of any format that OpenCV reads.
    reduce: 1, 2, 4 or 8: divides the sides; only for JPEG.

  Raises:
    BadImage: with one of REASONS.
  """
  width, height = read_size(image)
  if width * height > _MAX_PIXELS:
    raise BadImage(_TOO_LARGE)
  # Only these keep their alpha, which IMREAD_COLOR would drop.
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


def read_size(image: bytes) -> tuple[int, int]:
  """Returns (width, height) as the header has it, without decoding.

  Raises:
    BadImage: empty, or not an image.
  """
  if not image:
    raise BadImage(_EMPTY)
  # Pillow's parsers take 44 us for a JPEG that decodes in 400.
  if image.startswith(_JPEG):
    return _jpeg_size(image)
  if image.startswith(_PNG) and len(image) >= 24:
    return struct.unpack('>II', image[16:24])
  try:
    with Image.open(io.BytesIO(image)) as header:
      return header.size
  except Image.DecompressionBombError as e:
    raise BadImage(_TOO_LARGE) from e
  except Exception as e:  # Its parsers raise whatever they stumble over.
    cut = image.startswith((b'RIFF', b'GIF8')) or image[4:8] == b'ftyp'
    raise BadImage(_UNDECODABLE if cut else _NOT_AN_IMAGE) from e


def random_resized_crop(
  image: bytes,
  size: int,
  draws: Sequence[float],
  *,
  area: tuple[float, float],
  flip: bool,
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Decodes, crops a random rectangle, resizes it to uint8 [size, size, 3].

  A JPEG whose crop is at least twice as large as needed is decoded at half,
  a quarter or an eighth of its size.

  Args:
    image: encoded.
    size: side of the result in pixels.
    draws: NUM_DRAWS random numbers in [0, 1), that say which crop it is.
    area: smallest and largest share of the image that is kept.
    flip: mirror every second result.
    out: uint8 [size, size, 3] that gets the result; a new one if not given.

  Raises:
    BadImage: see `decode`.
  """
  width, height = read_size(image)
  left, top, crop_w, crop_h = _crop_box(width, height, draws, area)
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
  if flip and draws[4] < 0.5:
    cv2.flip(cv2.resize(crop, (size, size)), 1, dst=out)
  else:
    cv2.resize(crop, (size, size), dst=out)  # Bilinear.
  return out


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
  """Resizes with antialiasing (Pillow), then crops a square.

  Of an image that would be very large only the crop is made, from the pixels
  that it needs; these values differ by rounding.

  Args:
    pixels: uint8 [H, W, 3].
    shape: (height, width) it is resized to.
    size: side of the square.
    start: (top, left) of the square in the resized image.
    resample: Pillow's number of the filter.
    largest: pixels up to which the resized image is made whole; an image that
      is at most eight times as long as wide is in any case.

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
  """What a part of a resized side is made from.

  Args:
    begin: first pixel of the part.
    size: pixels of the part.
    new: pixels of the resized side.
    old: pixels of the side.

  Returns:
    First pixel of the side that is needed and the one after the last, and
    begin and end of the part within these.
  """
  low, high = begin * old / new, min(old, (begin + size) * old / new)
  reach = math.ceil(_FILTER_REACH * max(1, old / new)) + 1
  first, last = max(0, int(low) - reach), min(old, math.ceil(high) + reach)
  return first, last, low - first, high - first


def _crop_box(
  width: int,
  height: int,
  draws: Sequence[float],
  area: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Returns (left, top, width, height) in pixels."""
  low, high = area
  kept = height * width * (low + (high - low) * draws[0])
  low, high = map(math.log, _ASPECT_RATIO)
  ratio = math.exp(low + (high - low) * draws[1])
  crop_w = min(width, max(1, round(math.sqrt(kept * ratio))))
  crop_h = min(height, max(1, round(math.sqrt(kept / ratio))))
  top = int((height - crop_h + 1) * draws[2])
  left = int((width - crop_w + 1) * draws[3])
  return left, top, crop_w, crop_h


def _jpeg_size(image: bytes) -> tuple[int, int]:
  """Walks the markers up to the frame header."""
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
  """OpenCV's unchanged pixels (grey, BGR or BGRA, 8 or 16 bits) as RGB."""
  if pixels.dtype == np.uint16:
    pixels = (pixels >> 8).astype(np.uint8)
  if pixels.ndim == 2:
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
  if pixels.shape[2] == 3:
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
  alpha = pixels[:, :, 3:].astype(np.uint16)
  color = pixels[:, :, 2::-1].astype(np.uint16)
  return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
