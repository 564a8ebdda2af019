"""Colours of patch features."""

import jax
import numpy as np

from mlcd_jax import models
from mlcd_jax.page import patches


def test_like_patches_have_like_colours(tiny_config):
  tiny_config.model.pooling = 'class_token'  # It is no patch.
  tiny_config.model.variant = 'Nano/7'
  model = models.make(tiny_config.model)
  images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
  images[1] = images[0]
  params = model.init(jax.random.key(0), images)['params']
  found = patches.colours(model, params, images)
  assert found.shape == (2, 4, 4, 3) and found.dtype == np.uint8
  np.testing.assert_allclose(found[0].astype(int), found[1].astype(int), atol=1)
  assert found.min() == 0 and found.max() == 255
  assert np.ptp(found[0].reshape(-1, 3), axis=0).min() > 100
