"""The cluster stage: finds the centers and labels every row with them."""

import logging
import pathlib

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import manifests
from mlcd_jax.cluster import centers as centers_lib
from mlcd_jax.cluster import coverage
from mlcd_jax.cluster import labels as labels_lib
from mlcd_jax.cluster import rules
from mlcd_jax.config import sizes
from mlcd_jax.embed import row_files
from mlcd_jax.embed import shards
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import progress as progress_lib

_log = logging.getLogger(__name__)


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  embedded: manifests.Manifest,
  mesh: Mesh,
) -> None:
  """Clusters images or views and writes the labels of every image.

  Args:
    config: the config of the run.
    manifest: the manifest of this stage.
    embedded: the manifest of the embed stage.
    mesh: the mesh of all devices.

  Raises:
    UserError: the embeddings have changed, there are too few, or the config
      needs views and there are none.
  """
  files.check_sha256(embedded.folder, embedded.result['sha256'])
  rows, views = shards.open_made(embedded), None
  wanted = config.cluster.fit_on, config.cluster.rule
  # Pursuit uses views where there are some.
  if 'views' in wanted or (
    'pursuit' in wanted and embedded.result.get('views')
  ):
    views = shards.open_views(embedded)
  config = _with_num_centers(config, rows.shape[0])
  folder = manifest.folder
  centers_path = folder / 'centers.npy'
  if not distributed.decide('centers', centers_path.exists):
    fitted = views if config.cluster.fit_on == 'views' else rows
    centers_lib.run(config, fitted, folder, mesh)
  centers = files.read_npy(centers_path)
  missing = _label(config, folder, rows, views, centers, mesh)
  _check_labelled(config, missing, rows.shape[0])
  coverage.run(config, folder, rows)
  manifest.finish(
    num_centers=config.cluster.num_centers,
    num_labels=config.cluster.num_labels,
    sha256={
      path.name: files.sha256(path) for path in sorted(folder.glob('*.npy'))
    },
  )


def _label(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  rows: row_files.Sharded,
  views: row_files.Sharded | None,
  centers: np.ndarray,
  mesh: Mesh,
) -> int:
  """Writes the label shards that are missing.

  All images from the first missing shard on are one stream, so that shards of
  few rows cost no padding and the centers are put onto the devices once.

  Returns:
    The number of images without a label.
  """
  shard_rows, num_labels = rows.shard_rows, config.cluster.num_labels
  done = distributed.decide('labels', lambda: _labelled(folder, shard_rows))
  missing = 0
  for shard in range(done):
    labels = files.read_npy(labels_lib.label_path(folder, shard))
    missing += int(np.sum(labels[:, 0] < 0))
  start = sum(shard_rows[:done])
  pieces = rules.RULES[config.cluster.rule](
    _images(rows, views, start), centers, num_labels, mesh=mesh
  )
  progress = progress_lib.Progress('label', rows.shape[0], unit='rows')
  progress.update(start)
  cut = rules.recut(pieces, shard_rows[done:], num_labels)
  for shard, (labels, scores) in enumerate(cut, start=done):
    if distributed.is_main():
      files.write_npy(
        labels_lib.score_path(folder, shard), scores.astype(np.float16)
      )
      files.write_npy(labels_lib.label_path(folder, shard), labels)
    distributed.barrier(f'labels {shard}')
    missing += int(np.sum(labels[:, 0] < 0))
    start += len(labels)
    progress.update(start)
  return missing


def _labelled(folder: pathlib.Path, shard_rows: list[int]) -> int:
  """Returns how many shards from the first on have labels."""
  for shard in range(len(shard_rows)):
    if not labels_lib.label_path(folder, shard).exists():
      return shard
  return len(shard_rows)


def check(
  config: ml_collections.ConfigDict, embedded: manifests.Manifest
) -> None:
  """Raises UserError if there are fewer images than labels of an image."""
  num_images = sum(embedded.result['shard_rows'])
  if num_images < config.cluster.num_labels:
    raise errors.UserError(
      f'cluster.num_labels={config.cluster.num_labels} is more than the '
      f'{num_images} images; lower it, and loss.num_positives with it'
    )


def _check_labelled(
  config: ml_collections.ConfigDict, missing: int, num_images: int
) -> None:
  """Warns of images without a label; raises UserError if all are."""
  if missing == num_images:
    raise errors.UserError(
      f'cluster.rule={config.cluster.rule}: no image gets a label from '
      f'{config.cluster.num_centers} centers; set another rule, or more '
      'cluster.num_centers, in another --workdir'
    )
  if missing:
    _log.warning('cluster: %d of %d images have no label', missing, num_images)


def _with_num_centers(
  config: ml_collections.ConfigDict, num_images: int
) -> ml_collections.ConfigDict:
  """Returns the config with the number of centers chosen if it is 0."""
  if config.cluster.num_centers:
    return config
  config = config.copy_and_resolve_references()
  config.cluster.num_centers = sizes.num_centers(config, num_images)
  _log.info(
    'cluster: %d centers for %d images; set cluster.num_centers for another '
    'number',
    config.cluster.num_centers,
    num_images,
  )
  return config


def _images(
  rows: row_files.Sharded, views: row_files.Sharded | None, start: int
) -> rules.Images:
  """Returns the images from one on, with their views if there are any."""
  part = _From(rows, start)
  if views is None:
    return rules.Images(part)
  each = views.rows_per_image
  return rules.Images(part, _From(views, each * start), each)


class _From:
  """The rows from one on, read by slices as they may not fit in memory."""

  def __init__(self, rows: row_files.Sharded, start: int):
    self._rows = rows
    self._start = start
    self.shape = (rows.shape[0] - start, rows.shape[1])

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    return self._rows[self._start + start : self._start + stop]
