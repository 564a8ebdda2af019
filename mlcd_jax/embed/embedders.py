"""The interface of an embedder, the HOG embedder, and which one a run has.

Shapes: B images, H x W pixels, S pixels of a side, D dimensions.

To add an embedder: write its class, name it in `EMBEDDERS` of
config/choices.py, and give it a branch in `pin` and in `load_embedder`.
"""

from collections.abc import Callable
from typing import Any
from typing import Protocol

import jax
import ml_collections
import numpy as np
import skimage.feature

from mlcd_jax import manifests
from mlcd_jax.data import transforms
from mlcd_jax.embed import encoder
from mlcd_jax.weights import pinned


class Embedder(Protocol):
  """A function from images to unit rows."""

  image_size: int  # S, the pixels of a side of its images.
  batch_rows: int  # The most images in one call of `submit`.

  def prepare(self, pixels: np.ndarray) -> np.ndarray:
    """Resizes an RGB image, uint8 [H, W, 3], to uint8 [S, S, 3]."""
    ...

  def submit(self, images: np.ndarray) -> np.ndarray | jax.Array:
    """Starts to embed up to `batch_rows` images.

    The result may have padding rows at its end, and may still be computing.
    """
    ...

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Returns the unit rows, float32 [B, D], of images uint8 [B, S, S, 3]."""
    ...


class Hog:
  """Histograms of oriented gradients of scikit-image, minus a mean.

  They have 9 orientations, cells of 7 x 7 pixels and blocks of 2 x 2 cells. At
  28 pixels this gives 324 dimensions.
  """

  def __init__(
    self,
    image_size: int,
    mean: np.ndarray | None = None,
    *,
    batch_size: int = 64,
  ):
    self.image_size = image_size or 28  # 4 x 4 cells.
    self.mean = mean
    self.batch_rows = batch_size

  def prepare(self, pixels: np.ndarray) -> np.ndarray:
    """See `Embedder`."""
    return transforms.resize_center_crop(pixels, self.image_size)

  def submit(self, images: np.ndarray) -> np.ndarray:
    """See `Embedder`."""
    return self(images)

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """See `Embedder`."""
    rows = self.features(images)
    if self.mean is not None:
      rows -= self.mean
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    # A zero row stays zero instead of NaN.
    return rows / np.maximum(norm, np.finfo(np.float32).tiny)

  def features(self, images: np.ndarray) -> np.ndarray:
    """Returns the raw features, float32 [B, D], of images uint8 [B, S, S, 3].

    They are neither centered nor normalised.
    """
    return np.stack(
      [
        skimage.feature.hog(
          image.mean(-1),
          orientations=9,
          pixels_per_cell=(7, 7),
          cells_per_block=(2, 2),
        )
        for image in images
      ]
    ).astype(np.float32)


def pin(
  config: ml_collections.ConfigDict, mean_row: Callable[[Hog], np.ndarray]
) -> dict[str, Any]:
  """Returns what `load_embedder` needs to make the same embedder again.

  Args:
    config: the `embed` fields.
    mean_row: returns the mean features [D] of all images, for HOG.
  """
  if config.embedder == 'huggingface':
    return pinned.pin(config.path, 'embed.path')
  if config.embedder == 'checkpoint':
    return pinned.pin_run(config.path)
  return {'mean': mean_row(Hog(config.image_size)).tolist()}


def load_embedder(
  manifest: manifests.Manifest, *, batch_size: int = 64
) -> Embedder | None:
  """Returns the embedder of an embed stage.

  Args:
    manifest: the manifest of the stage.
    batch_size: the number of images per device and call; the rows do not depend
      on it.

  Returns:
    The embedder, or None if the embeddings were made elsewhere.
  """
  config = manifest.config
  if config['embed.embedder'] == 'precomputed':
    return None
  size = config['embed.image_size']
  if config['embed.embedder'] == 'huggingface':
    pinned.check(manifest.notes, 'embed.path')
    return encoder.Huggingface(
      manifest.notes['path'],
      image_size=size,
      batch_size=batch_size,
      dtype=config['embed.dtype'],
    )
  if config['embed.embedder'] == 'checkpoint':
    return encoder.from_checkpoint(
      manifest.notes, image_size=size, batch_size=batch_size,
      dtype=config['embed.dtype'],
    )  # fmt: skip
  mean = np.asarray(manifest.notes['mean'], np.float32)
  return Hog(size, mean, batch_size=batch_size)
