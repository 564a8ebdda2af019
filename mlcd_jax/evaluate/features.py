"""Frozen features of labelled data sets, extracted once for all tasks.

Shapes: N images, D features.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import embed
from mlcd_jax import metrics
from mlcd_jax import sharding
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources

# Side that images are brought to before their pixels serve as features.
_RAW_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Features:
  """One data set through one encoder; bad images are left out.

  Attributes:
    train: float32 [N, D].
    train_labels: int32 [N].
    test: float32 [M, D].
    test_labels: int32 [M].
    num_classes: of the data set.
  """

  train: np.ndarray
  train_labels: np.ndarray
  test: np.ndarray
  test_labels: np.ndarray
  num_classes: int


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Images in, features out.

  Attributes:
    image_size: pixels of the images it takes.
    encode: this host's images uint8 [b, S, S, 3] of a global batch ->
      float32 [B, D] of all of it.
    prepare: RGB uint8 [H, W, 3] of any size to uint8 [S, S, 3]; shorter side
      and center where not given.
  """

  image_size: int
  encode: Callable[[np.ndarray], np.ndarray]
  prepare: Callable[[np.ndarray], np.ndarray] | None = None


def from_model(model, params, image_size: int, mesh: Mesh) -> Encoder:
  """Pooled features of one of the project's models.

  Args:
    model: returns a dict with `pooled`.
    params: on the devices.
    image_size: pixels.
    mesh: over which a batch is split.
  """

  @jax.jit
  def pooled(params, images):
    out = model.apply({'params': params}, images)['pooled']
    return jax.lax.with_sharding_constraint(
      out, NamedSharding(mesh, sharding.REPLICATED)
    )

  def encode(images):
    batch = sharding.put_batch(mesh, {'image': images})
    return np.asarray(pooled(params, batch['image']))

  return Encoder(image_size, encode)


def from_embedder(embedder: embed.Embedder) -> Encoder:
  """The features that were clustered."""
  return Encoder(
    embedder.image_size,
    lambda images: _all_hosts(embedder(images)),
    embedder.prepare,
  )


def raw_pixels() -> Encoder:
  """Pixels in 0 .. 1, at 32 x 32."""
  return Encoder(
    _RAW_SIZE,
    lambda images: _all_hosts(
      images.reshape(len(images), -1).astype(np.float32) / 255
    ),
  )


def extract(
  encoder: Encoder,
  source: sources.Source,
  *,
  batch_size: int,
  name: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a whole source.

  Args:
    encoder: see `Encoder`.
    source: labelled images.
    batch_size: images a call, over all hosts.
    name: shown while it runs.

  Returns:
    features float32 [N, D] and labels int32 [N] of the images that decode.
  """
  progress = metrics.Progress(name, len(source), unit='images')
  rows, labels, weights = [], [], []
  for batch in pipelines.ordered_batches(
    source,
    batch_size=batch_size,
    image_size=encoder.image_size,
    prepare=encoder.prepare,
  ):
    rows.append(encoder.encode(batch['image']))
    labels.append(_all_hosts(batch['label']))
    weights.append(_all_hosts(batch['weight']))
    progress.update(min(len(source), len(rows) * batch_size))
  good = np.concatenate(weights) > 0
  return np.concatenate(rows)[good], np.concatenate(labels)[good]


def _all_hosts(rows: np.ndarray) -> np.ndarray:
  """Joins every host's rows of a global batch, in order."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)
