"""Reads the labels that the cluster stage wrote.

labels_00000.npy holds int32 [n, L], nearest center first, and
scores_00000.npy their cosines; row i belongs to row i of the embedding shard
of the same number, whose metadata has its key.
"""

import bisect
import pathlib

import numpy as np

from mlcd_jax import manifests
from mlcd_jax.runtime import files


class Labels:
  """The labels of a finished cluster stage, by row of the embeddings.

  Attributes:
    folder: the folder of the cluster stage.
    num_classes: the number of centers.
  """

  def __init__(
    self, manifest: manifests.Manifest, *, min_similarity: float = -1.0
  ):
    """Opens the label shards.

    Args:
      manifest: the manifest of the cluster stage.
      min_similarity: labels with a lower cosine become -1.

    Raises:
      UserError: a file is missing or has changed.
    """
    self.folder = manifest.folder
    self.num_classes = manifest.result['num_centers']
    files.check_sha256(manifest.folder, manifest.result['sha256'])
    paths = sorted(manifest.folder.glob('labels_*.npy'))
    self._shards = _open(paths)
    self._scores = None
    # No cosine is below -1, so the default needs no scores.
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
  """Maps shards into memory; worker processes map the same files."""
  return [files.SharedArray(files.read_npy(path), path) for path in paths]


def label_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """Returns the file of a shard's labels.

  It exists only once the shard is complete: the scores are written before it.
  """
  return folder / f'labels_{shard:05d}.npy'


def score_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """Returns the file of a shard's cosines."""
  return folder / f'scores_{shard:05d}.npy'
