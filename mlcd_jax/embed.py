"""The embed stage: images to unit rows by an off-the-shelf encoder.

Shards are ranges of records, not of hosts, so their bytes are the same for
any number of hosts and a finished one is skipped after a restart.
"""

import logging
import pathlib
from typing import Any
from typing import Protocol

import jax
import ml_collections
import numpy as np
import skimage.feature

from mlcd_jax import distributed
from mlcd_jax import embeddings
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import manifests
from mlcd_jax import metrics
from mlcd_jax.data import problems
from mlcd_jax.data import sources
from mlcd_jax.data import transforms

_log = logging.getLogger(__name__)


class Embedder(Protocol):
  """Images in, unit rows out."""

  image_size: int  # Pixels of the square images it takes.

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> float32 [B, D] unit rows."""
    ...


class Hog:
  """Histograms of oriented gradients, centered on a mean (scikit-image).

  9 orientations, cells of 7 x 7 pixels, blocks of 2 x 2 cells: 324 dimensions
  at 28 pixels.
  """

  def __init__(self, image_size: int, mean: np.ndarray | None = None):
    self.image_size = image_size or 28
    self.mean = mean

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


def load_embedder(manifest: manifests.Manifest) -> Embedder:
  """Returns the embedder that made a finished embed stage."""
  return Hog(
    manifest.config['embed.image_size'],
    np.asarray(manifest.notes['mean'], np.float32),
  )


def run(
  config: ml_collections.ConfigDict, manifest: manifests.Manifest
) -> None:
  """Embeds `data.split` into the manifest's folder.

  Raises:
    UserError: the data cannot be read, or too much of it is bad.
  """
  source = sources.make(config.data)
  sources.check_bad_keys(config.data.bad_keys, manifest)
  if 'mean' not in manifest.notes:
    embedder = Hog(config.embed.image_size)
    manifest.notes['mean'] = _mean_row(embedder, source).tolist()
    manifest.save()
  embedder = load_embedder(manifest)
  folder = manifest.folder
  starts = range(0, len(source), config.embed.shard_rows)
  progress = metrics.Progress('embed', len(source), unit='images')
  for shard, start in enumerate(starts):
    stop = min(start + config.embed.shard_rows, len(source))
    if (
      shard % jax.process_count() == jax.process_index()
      and not embeddings.row_path(folder, shard).exists()
    ):
      _embed_shard(embedder, source, range(start, stop), folder, shard, config)
    progress.update(stop)
  distributed.barrier('embed')
  manifest.finish(**_summary(folder, len(starts), len(source), config))


def _embed_shard(
  embedder: Embedder,
  source: sources.Source,
  records: range,
  folder: pathlib.Path,
  shard: int,
  config: ml_collections.ConfigDict,
) -> None:
  """Embeds some records into one shard; bad images have no row."""
  rows, keys, captions = [], [], []
  bad = problems.Problems('embed')
  for start in range(records.start, records.stop, config.embed.batch_size):
    stop = min(start + config.embed.batch_size, records.stop)
    images = []
    for i in range(start, stop):
      record = source[i]
      try:
        images.append(_image(embedder, record))
      except transforms.BadImage as e:
        bad.add(record['key'], str(e))
        continue
      keys.append(record['key'])
      captions.append(record['caption'])
    if images:
      rows.append(embedder(np.stack(images)))
  if not rows:  # The width comes from an image that is always there.
    size = embedder.image_size
    rows = [embedder(np.zeros((1, size, size, 3), np.uint8))[:0]]
  embeddings.write_shard(
    folder,
    shard,
    rows=np.concatenate(rows),
    keys=keys,
    captions=captions,
    notes={'bad': dict(bad.counts), 'examples': bad.examples},
  )


def _image(embedder: Embedder, record: dict[str, Any]) -> np.ndarray:
  return transforms.resize_center_crop(
    transforms.decode(record['image']), embedder.image_size
  )


def _mean_row(embedder: Hog, source: sources.Source) -> np.ndarray:
  """The mean of all features, in a pass of its own.

  Every host makes the whole pass, which keeps the sum's order fixed.
  """
  total, count = 0.0, 0
  progress = metrics.Progress('embed (mean)', len(source), unit='images')
  for i in range(len(source)):
    try:
      image = _image(embedder, source[i])
    except transforms.BadImage:
      continue
    total = total + embedder.features(image[None])[0].astype(np.float64)
    count += 1
    progress.update(i + 1)
  if not count:
    raise errors.UserError('data.path: not one image could be decoded')
  return (total / count).astype(np.float32)


def _summary(
  folder: pathlib.Path,
  num_shards: int,
  num_records: int,
  config: ml_collections.ConfigDict,
) -> dict[str, Any]:
  """The finished stage's manifest entry; refuses too many bad images."""
  bad = problems.Problems('embed')
  sha256 = {}
  for shard in range(num_shards):
    notes = embeddings.read_notes(folder, shard)
    bad.merge(notes['bad'], notes['examples'])
    metadata = embeddings.metadata_path(folder, shard)
    for path, digest in (
      (embeddings.row_path(folder, shard), notes['sha256']),
      (metadata, files.sha256(metadata)),
    ):
      sha256[str(path.relative_to(folder))] = digest
  bad.check(num_records, config.data.max_bad_fraction)
  rows = embeddings.Embeddings(folder, num_shards)
  return {
    'num_records': num_records,
    'shard_rows': rows.shard_rows,
    'dim': rows.shape[1],
    'bad': dict(bad.counts),
    'sha256': sha256,
  }
