"""Patch features and their picture."""

import io

import jax
import numpy as np
from PIL import Image
import pytest

from mlcd_jax import models
from mlcd_jax.evaluate import patches


@pytest.mark.parametrize('pooling', ['average', 'class_token'])
def test_patches_at_another_resolution(tiny_config, pooling):
  tiny_config.model.pooling = pooling
  model = models.make(tiny_config.model)
  images = np.random.default_rng(0).integers(0, 256, (2, 56, 28, 3), np.uint8)
  params = jax.jit(model.init)(jax.random.key(0), images[:, :28])['params']
  found = patches.patch_features(model, params, images)
  assert found.shape == (2, 4, 2, model.width)
  tokens = jax.jit(model.apply)({'params': params}, images)['tokens']
  first = int(pooling == 'class_token')
  np.testing.assert_allclose(found[1, 3, 1], tokens[1, first + 7], atol=1e-5)
  with pytest.raises(ValueError, match='57 x 28'):
    patches.patch_features(model, params, np.zeros((1, 57, 28, 3), np.uint8))
  png = patches.pca_picture(model, params, images, scale=2)
  assert Image.open(io.BytesIO(png)).size == (2 * 2 * 28, 2 * 2 * 56)


def test_colors_tell_features_apart():
  rng = np.random.default_rng(0)
  two = rng.normal(size=(2, 16))
  which = rng.integers(0, 2, (3, 8, 8))
  features = two[which] + 0.01 * rng.normal(size=(3, 8, 8, 16))
  red = patches.pca_colors(features)[..., 0]
  assert abs(red[which == 0].mean() - red[which == 1].mean()) > 200
  np.testing.assert_array_equal(
    patches.pca_colors(features), patches.pca_colors(features + 5)
  )
