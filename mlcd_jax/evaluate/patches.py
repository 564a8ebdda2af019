"""Patch features at any resolution, and their principal components in color.

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

  It drops the class token and the registers, and interpolates the position
  embeddings to the size of the images.

  Args:
    model: an encoder. The patches of a ResNet are the positions of its last
      feature map.
    params: the parameters of the model.
    images: uint8 [B, H, W, 3]; H and W are multiples of the patch size.

  Raises:
    ValueError: H or W is not a multiple of the patch size.
  """
  _, height, width, _ = images.shape
  patch = model.patch_size
  if height % patch or width % patch:
    raise ValueError(
      f'images of {height} x {width} pixels are not whole patches of {patch}'
    )
  grid = height // patch, width // patch
  out = jax.jit(model.apply)({'params': params}, images)
  # With parameters sharded over processes, the tokens may be sharded, too.
  tokens = sharding.to_host(out['tokens'])
  # The class token and the registers come before the patches.
  patches = tokens[:, -grid[0] * grid[1] :]
  return patches.reshape(len(images), *grid, -1)


def pca_colors(features: np.ndarray) -> np.ndarray:
  """Returns the first three principal components as RGB, uint8 [B, h, w, 3].

  The components are computed over all images together, so that a color means
  the same in each. Each component's 1st percentile becomes 0 and its 99th 255.

  Args:
    features: float [B, h, w, D] with D > 2.
  """
  rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
  rows -= rows.mean(0)
  axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]
  # An eigenvector's sign is arbitrary. Its largest weight is made positive, so
  # that the colors are the same on every machine.
  largest = axes[np.abs(axes).argmax(0), np.arange(3)]
  components = rows @ (axes * np.sign(largest))
  # Percentiles, since single outliers would make all other patches grey.
  low, high = np.percentile(components, (1, 99), axis=0)
  scaled = (components - low) / np.maximum(high - low, 1e-12)
  colors = (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)
  return colors.reshape(*features.shape[:-1], 3)


def pca_picture(
  model: Any, params: Any, images: np.ndarray, *, scale: int = 1
) -> bytes:
  """Returns a PNG with the images in a row and their components below.

  Args:
    model: an encoder; see `patch_features`.
    params: the parameters of the model.
    images: uint8 [B, H, W, 3]; H and W are multiples of the patch size.
    scale: the side in the PNG, in pixels, of one pixel of an image.
  """
  colors = pca_colors(patch_features(model, params, images))
  patch = model.patch_size
  colors = colors.repeat(patch, axis=1).repeat(patch, axis=2)
  rows = [np.concatenate(list(part), axis=1) for part in (images, colors)]
  picture = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
  out = io.BytesIO()
  Image.fromarray(picture).save(out, 'PNG')
  return out.getvalue()
