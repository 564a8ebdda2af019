"""The cluster stage's files: centers, and label shards.

labels_00000.npy holds int32 [n, L], nearest center first, and
scores_00000.npy their cosines; row i belongs to row i of the embedding shard
of the same number, whose metadata has its key.
"""

import bisect
import pathlib

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import cluster
from mlcd_jax import distributed
from mlcd_jax import embeddings
from mlcd_jax import files
from mlcd_jax import kmeans
from mlcd_jax import manifests
from mlcd_jax import metrics
from mlcd_jax import row_files


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  embedded: manifests.Manifest,
  mesh: Mesh,
) -> None:
  """Clusters the embeddings and writes every row's nearest centers.

  Args:
    config: of the run.
    manifest: of this stage.
    embedded: manifest of the embed stage.
    mesh: of all devices.

  Raises:
    UserError: the embeddings are not what was made, or too few.
  """
  files.check_sha256(embedded.folder, embedded.result['sha256'])
  rows = embeddings.open_made(embedded)
  folder = manifest.folder
  centers_path = folder / 'centers.npy'
  if not distributed.decide('centers', centers_path.exists):
    cluster.run(config, rows, folder, mesh)
  centers = files.read_npy(centers_path)
  todo = distributed.decide(
    'labels',
    lambda: [
      shard
      for shard in range(len(rows.shard_rows))
      if not label_path(folder, shard).exists()
    ],
  )
  progress = metrics.Progress('label', rows.shape[0], unit='rows')
  start = 0
  for shard, count in enumerate(rows.shard_rows):
    if shard in todo:
      labels, scores = kmeans.nearest_centers(
        _Part(rows, start, start + count),
        centers,
        config.cluster.num_labels,
        mesh=mesh,
      )
      # A row that is zero or not finite has the cosine 0 to every center.
      labels[scores[:, 0] == 0] = -1
      if distributed.is_main():
        files.write_npy(score_path(folder, shard), scores.astype(np.float16))
        files.write_npy(label_path(folder, shard), labels)
      distributed.barrier(f'labels {shard}')
    start += count
    progress.update(start)
  manifest.finish(
    num_centers=config.cluster.num_centers,
    num_labels=config.cluster.num_labels,
    sha256={
      path.name: files.sha256(path) for path in sorted(folder.glob('*.npy'))
    },
  )


class _Part:
  """Some rows of all, read by slices: a file may not fit in memory."""

  def __init__(self, rows: row_files.Sharded, start: int, stop: int):
    self._rows = rows
    self._start = start
    self.shape = (stop - start, rows.shape[1])

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    return self._rows[self._start + start : self._start + stop]


class Labels:
  """The label shards of a finished cluster stage, by row.

  Attributes:
    folder: of the cluster stage.
    num_classes: number of centers.
  """

  def __init__(
    self, manifest: manifests.Manifest, *, min_similarity: float = -1.0
  ):
    """Opens the shards.

    Args:
      manifest: of the cluster stage.
      min_similarity: labels whose cosine is lower become -1.

    Raises:
      UserError: a file is not what was made.
    """
    self.folder = manifest.folder
    self.num_classes = manifest.result['num_centers']
    files.check_sha256(manifest.folder, manifest.result['sha256'])
    paths = sorted(manifest.folder.glob('labels_*.npy'))
    self._shards = _open(paths)
    self._scores = None
    if min_similarity > -1:
      self._scores = _open(sorted(manifest.folder.glob('scores_*.npy')))
    self._min_similarity = min_similarity
    self._starts = np.cumsum([0] + [len(s) for s in self._shards]).tolist()

  def __getitem__(self, row: int) -> np.ndarray:
    """Returns the labels int32 [L] of one row, nearest first."""
    shard = bisect.bisect_right(self._starts, row) - 1
    place = row - self._starts[shard]
    labels = self._shards[shard][place]
    if self._scores is None:
      return labels
    similar = self._scores[shard][place] >= self._min_similarity
    return np.where(similar, labels, np.int32(-1))


def _open(paths: list[pathlib.Path]) -> list[files.SharedArray]:
  """Maps shards so that worker processes map them too."""
  return [files.SharedArray(files.read_npy(path), path) for path in paths]


def label_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's labels; it exists once the shard is whole."""
  return folder / f'labels_{shard:05d}.npy'


def score_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's cosines."""
  return folder / f'scores_{shard:05d}.npy'
