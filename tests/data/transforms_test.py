"""Crops and sizes."""

import cv2
import numpy as np
from PIL import Image
import pytest

from mlcd_jax.data import transforms


def gradient(height, width):
  rows = np.linspace(0, 255, height)[:, None, None]
  columns = np.linspace(0, 255, width)[None, :, None]
  pixels = np.broadcast_to(rows / 2 + columns / 2, (height, width, 1))
  return np.repeat(pixels, 3, 2).astype(np.uint8)


@pytest.mark.parametrize('extension', ['.png', '.jpg', '.webp'])
def test_decode_gives_rgb(extension):
  pixels = np.zeros((20, 30, 3), np.uint8)
  pixels[..., 0] = 200  # Red.
  encoded = cv2.imencode(extension, pixels[..., ::-1])[1].tobytes()
  decoded = transforms.decode(encoded)
  assert decoded.shape == (20, 30, 3)
  assert decoded[..., 0].mean() > 180 and decoded[..., 2].mean() < 20


@pytest.mark.parametrize('image', [b'', b'<html></html>', b'\xff\xd8\xff'])
def test_bad_bytes_are_refused(image):
  with pytest.raises(transforms.BadImage):
    transforms.decode(image)


def test_random_crop_is_seeded_and_keeps_its_area():
  pixels = gradient(60, 40)

  def crop(seed, **options):
    return transforms.random_resized_crop(
      pixels, 16, np.random.default_rng(seed), **options
    )

  whole = dict(area=(1.0, 1.0), flip=False)
  part = dict(area=(0.1, 0.2), flip=False)
  np.testing.assert_array_equal(crop(0, **part), crop(0, **part))
  assert not np.array_equal(crop(0, **part), crop(1, **part))
  spread = [int(np.ptp(crop(0, **options))) for options in (whole, part)]
  assert spread[0] > 1.5 * spread[1]
  flipped = [crop(s, area=(1.0, 1.0), flip=True) for s in range(20)]
  rising = [f[8, -1, 0] > f[8, 0, 0] for f in flipped]
  assert 0 < sum(rising) < 20


def test_center_crop_equals_pillow():
  pixels = gradient(60, 40)
  found = transforms.resize_center_crop(pixels, 20)
  resized = Image.fromarray(pixels).resize((20, 30), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found, np.asarray(resized)[5:25])
  np.testing.assert_array_equal(
    transforms.resize_center_crop(pixels[:40], 40), pixels[:40]
  )
