"""Images by key, and as data URLs."""

import base64
import io

import numpy as np
from PIL import Image

from mlcd_jax.page import thumbnails


class Source:
  """Only its keys."""

  def __init__(self, keys):
    self._keys = np.array([k.encode() for k in keys])

  def keys(self):
    return self._keys


def decoded(url):
  head, _, data = url.partition(',')
  assert head == 'data:image/webp;base64'
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def png(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def test_records_by_key():
  source = Source(['a', 'bär', 'c', 'd', 'e'])
  found = thumbnails.find(source, ['e', 'bär', 'nobody'], chunk=2)
  assert found == {'bär': 1, 'e': 4}
  paths = ['/x/e.jpg', '/x/bär.jpg', '/x/nobody.jpg']
  found = thumbnails.find(source, paths, chunk=2)
  assert found == {'/x/bär.jpg': 1, '/x/e.jpg': 4}


def test_small_images_keep_every_pixel():
  pixels = np.random.default_rng(0).integers(0, 256, (28, 20, 3), np.uint8)
  np.testing.assert_array_equal(
    decoded(thumbnails.make({'image': png(pixels)})), pixels
  )


def test_large_images_are_made_small():
  pixels = np.zeros((300, 600, 3), np.uint8)
  pixels[:, :300] = (200, 40, 90)
  found = decoded(thumbnails.make({'image': png(pixels)}))
  assert found.shape == (48, 96, 3)
  np.testing.assert_allclose(found[18, 10], (200, 40, 90), atol=6)
  np.testing.assert_allclose(found[18, 60], 0, atol=6)


def test_bad_images_have_none():
  assert thumbnails.make({'image': b'nothing'}) is None
