"""Patch features at any resolution, and a picture of them.

Shapes: B images, H x W pixels, h x w patches, D features.
"""

import io
from typing import Any

import jax
import numpy as np
from PIL import Image

from mlcd_jax import sharding


def patch_features(model: Any, params: Any, images: np.ndarray) -> np.ndarray:
  """Returns the patches' features after the last norm, float32 [B, h, w, D].

  Class token and registers are left out; positions are interpolated.

  Args:
    model: an encoder; the patches of a ResNet are its last map's positions.
    params: of the model.
    images: uint8 [B, H, W, 3], both sides multiples of the patch size.

  Raises:
    ValueError: sides that are not.
  """
  _, height, width, _ = images.shape
  patch = model.patch_size
  if height % patch or width % patch:
    raise ValueError(
      f'images of {height} x {width} pixels are not whole patches of {patch}'
    )
  grid = height // patch, width // patch
  out = jax.jit(model.apply)({'params': params}, images)
  # Where parameters are split over processes, so may be the tokens.
  tokens = sharding.to_host(out['tokens'])
  patches = tokens[:, -grid[0] * grid[1] :]
  return patches.reshape(len(images), *grid, -1)


def pca_colors(features: np.ndarray) -> np.ndarray:
  """Returns the first three principal components as RGB, uint8 [B, h, w, 3].

  The components are those of all images together, so that equal colors mean
  equal features; each is stretched from its 1st to its 99th percentile. Its
  sign is that which makes its largest weight positive.

  Args:
    features: float [B, h, w, D] with D > 2.
  """
  rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
  rows -= rows.mean(0)
  axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]
  largest = axes[np.abs(axes).argmax(0), np.arange(3)]
  components = rows @ (axes * np.sign(largest))
  low, high = np.percentile(components, (1, 99), axis=0)
  scaled = (components - low) / np.maximum(high - low, 1e-12)
  colors = (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)
  return colors.reshape(*features.shape[:-1], 3)


def pca_picture(
  model: Any, params: Any, images: np.ndarray, *, scale: int = 1
) -> bytes:
  """Returns a PNG with the images above their principal components.

  Args:
    model: see `patch_features`.
    params: of the model.
    images: uint8 [B, H, W, 3], both sides multiples of the patch size.
    scale: pixels of the picture a pixel of an image.
  """
  colors = pca_colors(patch_features(model, params, images))
  patch = model.patch_size
  colors = colors.repeat(patch, axis=1).repeat(patch, axis=2)
  rows = [np.concatenate(list(part), axis=1) for part in (images, colors)]
  picture = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
  out = io.BytesIO()
  Image.fromarray(picture).save(out, 'PNG')
  return out.getvalue()
