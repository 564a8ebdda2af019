"""Images by key, small enough to lie in a page by the thousand."""

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

SMALL = 96  # Pixels of the longer side.
LARGE = 224
_QUALITY = 60
_LOSSLESS = 32  # Up to this side WebP's losses show and save nothing.
_CHUNK = 1_000_000  # Keys looked through at a time.


def find(
  source: sources.Source, keys: Sequence[str], root: str = ''
) -> dict[str, int]:
  """Returns the number of each key's record; unknown keys are left out.

  Args:
    source: of the records.
    keys: of embeddings.
    root: folder of the records, see `matching.join`.
  """
  wanted = {key.encode() for key in keys}
  found = {}
  all_keys = source.keys()
  for start in range(0, len(all_keys), _CHUNK):
    chunk = all_keys[start : start + _CHUNK].tolist()
    if wanted.intersection(chunk):
      for i, key in enumerate(chunk):
        if key in wanted:
          found.setdefault(keys_lib.text(key), start + i)
  if 2 * len(found) < len(wanted):  # They are paths, not keys.
    unique = list(wanted)
    rows = matching.join(all_keys, np.array(unique), root)
    for record in np.flatnonzero(rows >= 0).tolist():
      found.setdefault(keys_lib.text(unique[rows[record]]), record)
  return found


def make(record: dict[str, Any], size: int = SMALL) -> str | None:
  """Returns a record's image as a data URL; None where it cannot be decoded.

  Args:
    record: of a source.
    size: pixels of the longer side at most.
  """
  try:
    pixels = transforms.decode(record['image'])
  except transforms.BadImage:
    return None
  return encode(pixels, size)


def encode(pixels: np.ndarray, size: int) -> str:
  """Returns uint8 [H, W, 3] as a data URL, no side longer than `size`."""
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
