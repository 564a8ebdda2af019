"""Every kind of image file, good and bad, with its exact outcome."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
from PIL import Image
import pytest
import scipy.stats

from mlcd_jax.data import transforms
from tests.data import shards


def _smooth(height=48, width=64):
  """A picture that survives JPEG and resizing."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x * 3, y * 4, 255 - x * 3], -1).astype(np.uint8)


def _pillow(image):
  with Image.open(io.BytesIO(image)) as opened:
    return np.asarray(opened.convert('RGB'))


def _bomb(width=9_000, height=9_000):
  """A PNG of 81 Mpixel by its header, with hardly any data."""

  def chunk(kind, data):
    body = kind + data
    return (
      struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))
    )

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b''))
    + chunk(b'IEND', b'')
  )


def _jpeg_bomb():
  """A JPEG whose frame header says 65,000 x 65,000."""
  image = bytearray(shards.encode(_smooth()))
  frame = image.index(b'\xff\xc0')
  image[frame + 5 : frame + 9] = struct.pack('>HH', 65_000, 65_000)
  return bytes(image)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'AVIF'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_formats_equal_pillow(kind, mode):
  image = shards.encode(Image.fromarray(_smooth()).convert(mode), kind)
  got = transforms.decode(image)
  assert got.shape == (48, 64, 3) and got.dtype == np.uint8
  np.testing.assert_allclose(
    got.astype(int), _pillow(image), atol=3 if kind == 'AVIF' else 1
  )


def test_cmyk():
  image = shards.encode(Image.fromarray(_smooth()).convert('CMYK'))
  np.testing.assert_allclose(
    transforms.decode(image).astype(int), _pillow(image), atol=2
  )


@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_palette(kind):
  image = shards.encode(Image.fromarray(_smooth()).convert('P'), kind)
  np.testing.assert_array_equal(transforms.decode(image), _pillow(image))


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_16_bits_become_8(channels):
  pixels = np.full((5, 6, channels), 0x80FF, np.uint16)
  if channels == 4:
    pixels[..., 3] = 0xFFFF
  image = cv2.imencode('.png', pixels)[1].tobytes()
  np.testing.assert_array_equal(
    transforms.decode(image), np.full((5, 6, 3), 0x80, np.uint8)
  )


@pytest.mark.parametrize(
  ('kind', 'options'),
  [('PNG', {}), ('WEBP', {'lossless': True, 'exact': True})],
)
def test_alpha_is_composited_on_white(kind, options):
  pixels = np.zeros((4, 3, 4), np.uint8)
  pixels[..., 0] = 200
  pixels[..., 3] = [0, 255, 51]
  got = transforms.decode(shards.encode(pixels, kind, **options))
  np.testing.assert_array_equal(
    got[0], [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
  )


def test_grey_with_alpha_and_transparent_palette():
  grey = Image.fromarray(np.full((4, 4), 100, np.uint8)).convert('LA')
  grey.putalpha(0)
  assert (transforms.decode(shards.encode(grey, 'PNG')) == 255).all()
  palette = Image.new('P', (4, 4), 1)
  palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
  palette.paste(0, (0, 0, 2, 4))
  for kind in ('PNG', 'GIF'):
    got = transforms.decode(shards.encode(palette, kind, transparency=0))
    np.testing.assert_array_equal(got[0, [0, 3]], [[255] * 3, [0, 255, 0]])


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_first_frame_of_an_animation(kind):
  first, second = Image.new('RGB', (8, 8), 'red'), Image.new('RGB', (8, 8))
  options = {'lossless': True} if kind == 'WEBP' else {}
  image = shards.encode(
    first, kind, save_all=True, append_images=[second], **options
  )
  assert (transforms.decode(image) == (255, 0, 0)).all()


def test_exif_orientation_is_ignored():
  exif = Image.Exif()
  exif[0x112] = 6  # Rotated by 90 degrees.
  image = shards.encode(_smooth(), exif=exif)
  assert transforms.decode(image).shape == (48, 64, 3)


def test_suffix_and_content_may_differ():
  image = shards.encode(_smooth(), 'PNG')  # As in a file named .jpg.
  np.testing.assert_array_equal(transforms.decode(image), _smooth())


_GOOD = shards.encode(_smooth(), quality=95)


@pytest.mark.parametrize(
  ('image', 'reason'),
  [
    (b'', 'empty'),
    (b'<html><body>404 Not Found</body></html>', 'not an image'),
    (b'\0' * 4_096, 'not an image'),
    (_GOOD[: len(_GOOD) // 2], 'undecodable'),
    (_GOOD[:-20], 'undecodable'),
    (_GOOD[:2], 'undecodable'),
    (shards.encode(_smooth(), 'PNG')[:-40], 'undecodable'),
    (shards.encode(_smooth(), 'WEBP')[:-40], 'undecodable'),
    (shards.encode(_smooth(), 'GIF')[:200], 'undecodable'),
    (_bomb(), 'more than 64 Mpixel'),
    (_jpeg_bomb(), 'more than 64 Mpixel'),
  ],
)
def test_bad_images(image, reason):
  with pytest.raises(transforms.BadImage, match=f'^{reason}$'):
    transforms.decode(image)
  assert reason in transforms.REASONS


def test_bomb_is_refused_before_decoding(monkeypatch):
  monkeypatch.setattr(transforms.cv2, 'imdecode', None)
  with pytest.raises(transforms.BadImage, match='64 Mpixel'):
    transforms.decode(_bomb(8_001, 8_000))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF'])
def test_read_size(kind):
  assert transforms.read_size(shards.encode(_smooth(), kind)) == (64, 48)


def test_read_size_of_progressive_and_padded_jpeg():
  image = shards.encode(_smooth(), progressive=True)
  assert transforms.read_size(image) == (64, 48)
  padded = image[:2] + b'\xff\xff' + image[2:]
  assert transforms.read_size(padded) == (64, 48)


def _crop(image, size, seed=0, area=(0.9, 1.0), flip=True):
  draws = np.random.default_rng(seed).random(transforms.NUM_DRAWS)
  return transforms.random_resized_crop(
    image, size, draws, area=area, flip=flip
  )


def test_crop_is_seeded():
  area = (0.4, 1.0)
  a, b = _crop(_GOOD, 28, area=area), _crop(_GOOD, 28, area=area)
  c = _crop(_GOOD, 28, seed=1, area=area)
  assert a.shape == (28, 28, 3) and a.flags.c_contiguous
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_crop_keeps_its_area_and_flips_every_second():
  whole, part = dict(area=(1.0, 1.0), flip=False), dict(area=(0.1, 0.2))
  crops = [_crop(_GOOD, 16, **options) for options in (whole, part)]
  spread = [int(np.ptp(crop[..., 0])) for crop in crops]
  assert spread[0] > 1.3 * spread[1]
  flipped = [_crop(_GOOD, 16, seed, area=(1.0, 1.0)) for seed in range(20)]
  falling = [f[8, 0, 0] > f[8, -1, 0] for f in flipped]
  assert 3 < sum(falling) < 17


def test_out_gets_the_result():
  out = np.zeros((2, 28, 28, 3), np.uint8)
  for seed in range(4):  # Flipped and not.
    draws = np.random.default_rng(seed).random(transforms.NUM_DRAWS)
    transforms.random_resized_crop(
      _GOOD, 28, draws, area=(0.9, 1.0), flip=True, out=out[1]
    )
    np.testing.assert_array_equal(out[1], _crop(_GOOD, 28, seed))
    assert not out[0].any()


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_reduced_decoding_gives_the_same_crop(factor):
  pixels = np.asarray(Image.fromarray(_smooth()).resize((1_280, 960)))
  jpeg, png = shards.encode(pixels, quality=95), shards.encode(pixels, 'PNG')
  for seed in range(4):
    a = _crop(jpeg, 800 // factor, seed)
    b = _crop(png, 800 // factor, seed)  # Never reduced.
    assert np.abs(a.astype(int) - b).mean() < 1.5


def _torchvision_box(width, height, rng, area):
  """Torchvision's RandomResizedCrop.get_params, written anew."""
  for _ in range(10):
    kept = width * height * rng.uniform(*area)
    ratio = np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
    w, h = round(np.sqrt(kept * ratio)), round(np.sqrt(kept / ratio))
    if 0 < w <= width and 0 < h <= height:
      return (
        rng.integers(0, height - h + 1),
        rng.integers(0, width - w + 1),
        w,
        h,
      )
  w, h = width, height
  if width < 0.8 * height:
    h = round(width / 0.8)
  elif width > 1.25 * height:
    w = round(height * 1.25)
  return (height - h) // 2, (width - w) // 2, w, h


@pytest.mark.parametrize(
  ('width', 'height', 'area'),
  [
    (400, 400, (0.4, 1.0)),
    (300, 200, (0.4, 1.0)),
    (1_600, 900, (0.4, 1.0)),
    (900, 1_600, (0.08, 1.0)),
    (1_600, 900, (0.7, 1.0)),
    (4_000, 40, (0.4, 1.0)),  # None fits.
  ],
)
def test_crops_are_distributed_as_torchvision_s(width, height, area):
  rng = np.random.default_rng(0)
  count = 4_000
  ours = np.array(
    [
      transforms.crop_box(width, height, draws, area)
      for draws in rng.random((count, transforms.NUM_DRAWS))
    ]
  )
  theirs = np.array(
    [_torchvision_box(width, height, rng, area) for _ in range(count)]
  )[:, [1, 0, 2, 3]]
  assert (ours >= [0, 0, 1, 1]).all()
  assert (ours[:, :2] + ours[:, 2:] <= [width, height]).all()
  for column in range(4):
    test = scipy.stats.ks_2samp(ours[:, column], theirs[:, column])
    assert test.pvalue > 1e-6
  fits = 1.25 * min(width, height) / max(width, height) > area[0]
  kept = ours[:, 2] * ours[:, 3] / (width * height)
  if fits and area[0] < 0.7:
    assert (kept > area[0] - 0.01).mean() > 0.999


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('side', [450, 1_792, 3_700])
def test_crops_do_not_alias(kind, side):
  # Rings that get finer outwards; at a twentieth they are all but grey.
  y, x = np.mgrid[:side, :side] / side
  rings = 127.5 + 127.5 * np.cos(150 * np.pi * (x**2 + y**2))
  pixels = np.repeat(rings.astype(np.uint8)[..., None], 3, -1)
  image = shards.encode(pixels, kind, quality=95)
  got = _crop(image, 64, area=(1.0, 1.0), flip=False)
  smooth = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX)
  # Plain bilinear: 70 to 88. A JPEG's last halving is bilinear: up to 14.
  limit = 15 if kind == 'JPEG' else 5
  assert np.sqrt(np.mean((got.astype(float) - smooth) ** 2)) < limit


def test_a_single_pixel():
  image = shards.encode(np.full((1, 1, 3), 7, np.uint8), 'PNG')
  assert (_crop(image, 8) == 7).all()
  resized = transforms.resize_center_crop(transforms.decode(image), 8)
  assert (resized == 7).all()


def test_resize_center_crop():
  pixels = _smooth(40, 80)
  got = transforms.resize_center_crop(pixels, 40)
  np.testing.assert_array_equal(got, pixels[:, 20:60])
  resized = Image.fromarray(pixels).resize((40, 20), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    transforms.resize_center_crop(pixels, 20), np.asarray(resized)[:, 10:30]
  )


def _resized_then_cropped(pixels, size):
  """What `resize_center_crop` is to give, made whole before it is cropped."""
  height, width = pixels.shape[:2]
  scale = size / min(height, width)
  new_h, new_w = (max(size, round(side * scale)) for side in (height, width))
  image = Image.fromarray(pixels).resize((new_w, new_h), Image.BICUBIC)
  top, left = (new_h - size) // 2, (new_w - size) // 2
  return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize('shape', [(480, 640), (97, 61), (30, 200), (8, 8)])
def test_ordinary_pictures_are_resized_and_cropped(shape):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  np.testing.assert_array_equal(
    transforms.resize_center_crop(pixels, 64),
    _resized_then_cropped(pixels, 64),
  )


@pytest.mark.parametrize('shape', [(1, 9_000), (9_000, 1), (40_001, 5)])
def test_of_long_pictures_only_the_crop_is_resized(shape):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  np.testing.assert_allclose(
    transforms.resize_center_crop(pixels, 48).astype(int),
    _resized_then_cropped(pixels, 48),
    atol=1,
  )


@pytest.mark.parametrize('resample', range(6))
@pytest.mark.parametrize('shape', [(7, 9_001), (9_001, 7)])
def test_the_crop_alone_for_every_filter(resample, shape):
  pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  scale = 63 / 7
  new_h, new_w = (round(side * scale) for side in shape)
  whole = Image.fromarray(pixels).resize((new_w, new_h), resample)
  top, left = (new_h - 63) // 3, (new_w - 63) // 3
  expected = np.asarray(whole)[top : top + 63, left : left + 63]
  for largest in (0, 10**9):
    cropped = transforms.resize_crop(
      pixels, (new_h, new_w), 63, (top, left), resample, largest=largest
    )
    np.testing.assert_allclose(cropped.astype(int), expected, atol=1)


def test_memory_for_long_pictures_is_bounded():
  """Within a limit under which the resized images would not fit."""
  code = (
    'import resource; import numpy as np\n'
    'from mlcd_jax.data import transforms\n'
    "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
    'resource.setrlimit(resource.RLIMIT_AS, (used + 10**8,) * 2)\n'
    'for shape in (1, 40_000), (40_000, 1), (20, 30_000), (1, 10**6):\n'
    '  pixels = np.zeros((*shape, 3), np.uint8)\n'
    '  small = transforms.resize_center_crop(pixels, 224)\n'
    '  assert small.shape == (224, 224, 3)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
