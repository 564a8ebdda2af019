"""The interface of an embedder, the HOG embedder, and which one a run has.

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
  """Images in, unit rows out."""

  image_size: int  # Pixels of the square images it takes.
  batch_rows: int  # Images it takes at once.

  def prepare(self, pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3] of any size -> uint8 [S, S, 3]."""
    ...

  def submit(self, images: np.ndarray) -> np.ndarray | jax.Array:
    """Up to batch_rows images -> their unit rows, maybe padded, maybe later."""
    ...

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> float32 [B, D] unit rows."""
    ...


class Hog:
  """Histograms of oriented gradients, centered on a mean (scikit-image).

  9 orientations, cells of 7 x 7 pixels, blocks of 2 x 2 cells: 324 dimensions
  at 28 pixels.
  """

  def __init__(
    self,
    image_size: int,
    mean: np.ndarray | None = None,
    *,
    batch_size: int = 64,
  ):
    self.image_size = image_size or 28
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
    return rows / np.maximum(norm, np.finfo(np.float32).tiny)

  def features(self, images: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> float32 [B, D], neither centered nor scaled."""
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
  """The embedder that made a finished embed stage; None if made elsewhere.

  Args:
    manifest: of the stage.
    batch_size: images per device and call, on which no row depends.
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
