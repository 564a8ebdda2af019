"""The first three principal components of patch features, as colours."""

from typing import Any

import jax
import numpy as np
from sklearn import decomposition

from mlcd_jax.models import vit


def colours(
  model: vit.ViT, params: dict[str, Any], images: np.ndarray
) -> np.ndarray:
  """One basis for all images, so that a colour means the same in each.

  Args:
    model: the encoder.
    params: of it.
    images: uint8 [B, S, S, 3].

  Returns:
    uint8 [B, H, W, 3], a pixel a patch; components from their 1st to their
    99th percentile.
  """
  out = jax.jit(model.apply)({'params': params}, images)
  side = images.shape[1] // model.patch_size
  tokens = np.asarray(out['tokens'])[:, -side * side :]  # Patches come last.
  flat = tokens.reshape(-1, tokens.shape[-1])
  count = min(3, *flat.shape)
  components = np.zeros((len(flat), 3), np.float32)
  components[:, :count] = decomposition.PCA(
    count, svd_solver='full'
  ).fit_transform(flat)
  low, high = np.percentile(components, (1, 99), axis=0)
  scaled = (components - low[None]) / np.maximum(high - low, 1e-9)[None]
  pixels = np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
  return pixels.reshape(len(images), side, side, 3)
