"""Thumbnails, small enough that a page can hold a thousand of them."""

import base64
from collections.abc import Sequence
import io
from typing import Any

import numpy as np
from PIL import Image

from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import matching
from mlcd_jax.data import sources
from mlcd_jax.data import transforms

# The longer side of a thumbnail, in pixels. In page.css the small ones are at
# most 72 pixels wide and the large ones at most 14 rem, about 224 pixels.
SMALL = 96
LARGE = 224
_QUALITY = 60  # WebP's, from 0 to 100.
# Up to this side in pixels a lossy image is visibly worse and not smaller.
_LOSSLESS = 32
_CHUNK = 1_000_000  # Keys that are converted to Python objects at a time.


def find(
  source: sources.Source,
  keys: Sequence[str],
  root: str = '',
  *,
  chunk: int = _CHUNK,
) -> dict[str, int]:
  """Returns the index of the record of each key, without the unknown keys.

  Args:
    source: the source of the records.
    keys: the keys of embeddings.
    root: the folder of the records; see `matching.root_of`.
    chunk: the keys of the source that are converted at a time.
  """
  wanted = {key.encode() for key in keys}
  found = {}
  all_keys = source.keys()
  for start in range(0, len(all_keys), chunk):
    part = all_keys[start : start + chunk].tolist()
    if wanted.intersection(part):
      for i, key in enumerate(part):
        if key in wanted:
          found.setdefault(keys_lib.text(key), start + i)
  # With fewer than half found, the embeddings have paths instead of keys.
  if 2 * len(found) < len(wanted):
    unique = list(wanted)
    rows = matching.join(all_keys, np.array(unique), root)
    for record in np.flatnonzero(rows >= 0).tolist():
      found.setdefault(keys_lib.text(unique[rows[record]]), record)
  return found


def make(record: dict[str, Any], size: int = SMALL) -> str | None:
  """Returns the image of a record as a data URL; None if it does not decode.

  Args:
    record: a record of a source.
    size: the maximum of the longer side, in pixels.
  """
  try:
    pixels = transforms.decode(record['image'])
  except transforms.BadImage:
    return None
  return encode(pixels, size)


def encode(pixels: np.ndarray, size: int) -> str:
  """Encodes an image as a data URL in WebP format.

  Args:
    pixels: uint8 [H, W, 3].
    size: the maximum of the longer side, in pixels; it never enlarges.
  """
  image = Image.fromarray(pixels)
  image.thumbnail((size, size))
  encoded = io.BytesIO()
  image.save(
    encoded,
    'WEBP',
    quality=_QUALITY,
    lossless=max(image.size) <= _LOSSLESS,
  )
  return 'data:image/webp;base64,' + base64.b64encode(
    encoded.getvalue()
  ).decode('ascii')
