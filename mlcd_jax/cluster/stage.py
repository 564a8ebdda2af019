"""The cluster stage: finds the centers and labels every row with them."""

import logging

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
  todo = distributed.decide(
    'labels',
    lambda: [
      shard
      for shard in range(len(rows.shard_rows))
      if not labels_lib.label_path(folder, shard).exists()
    ],
  )
  progress = progress_lib.Progress('label', rows.shape[0], unit='rows')
  start = missing = 0
  for shard, count in enumerate(rows.shard_rows):
    if shard in todo:
      labels, scores = rules.RULES[config.cluster.rule](
        _images(rows, views, start, start + count),
        centers,
        config.cluster.num_labels,
        mesh=mesh,
      )
      if distributed.is_main():
        files.write_npy(
          labels_lib.score_path(folder, shard), scores.astype(np.float16)
        )
        files.write_npy(labels_lib.label_path(folder, shard), labels)
      distributed.barrier(f'labels {shard}')
    else:
      labels = files.read_npy(labels_lib.label_path(folder, shard))
    missing += int(np.sum(labels[:, 0] < 0))
    start += count
    progress.update(start)
  _check_labelled(config, missing, rows.shape[0])
  coverage.run(config, folder, rows)
  manifest.finish(
    num_centers=config.cluster.num_centers,
    num_labels=config.cluster.num_labels,
    sha256={
      path.name: files.sha256(path) for path in sorted(folder.glob('*.npy'))
    },
  )


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
  rows: row_files.Sharded,
  views: row_files.Sharded | None,
  start: int,
  stop: int,
) -> rules.Images:
  """Returns a range of the images, with their views if there are any."""
  part = _Part(rows, start, stop)
  if views is None:
    return rules.Images(part)
  each = views.rows_per_image
  return rules.Images(part, _Part(views, each * start, each * stop), each)


class _Part:
  """A range of the rows, read by slices as it may not fit in memory."""

  def __init__(self, rows: row_files.Sharded, start: int, stop: int):
    self._rows = rows
    self._start = start
    self.shape = (stop - start, rows.shape[1])

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    return self._rows[self._start + start : self._start + stop]
