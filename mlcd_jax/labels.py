"""The cluster stage's files: centers, and label shards joined by key.

labels_00000.npy holds int32 [n, L], nearest center first, and
scores_00000.npy their cosines; row i belongs to row i of the embedding shard
of the same number, whose metadata has its key.
"""

import bisect
import functools
import logging
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import distributed
from mlcd_jax import embeddings
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import kmeans
from mlcd_jax import manifests
from mlcd_jax import metrics

_log = logging.getLogger(__name__)

# The clustering after its last whole iteration, until it is finished.
_STATE = 'unfinished.npz'

# Cosine above which two centers are as good as one.
_NEAR_DUPLICATE = 0.99


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
  if not (folder / 'centers.npy').exists():
    _cluster(config, rows, folder, mesh)
  centers = files.read_npy(folder / 'centers.npy')
  progress = metrics.Progress('label', rows.shape[0], unit='rows')
  start = 0
  for shard, count in enumerate(rows.shard_rows):
    if not label_path(folder, shard).exists():
      labels, scores = kmeans.nearest_centers(
        rows[start : start + count],
        centers,
        config.cluster.num_labels,
        mesh=mesh,
      )
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


def join(source_keys: np.ndarray, label_keys: np.ndarray) -> np.ndarray:
  """Returns the label row of every record, by key; -1 where there is none.

  Args:
    source_keys: [N], the records' keys, text or UTF-8.
    label_keys: [M], the keys of the label rows, in any order.
  """
  source_keys, label_keys = _as_bytes(source_keys), _as_bytes(label_keys)
  if not len(label_keys):
    return np.full(len(source_keys), -1)
  order = np.argsort(label_keys, kind='stable')
  place = np.searchsorted(label_keys, source_keys, sorter=order)
  row = order[np.minimum(place, len(order) - 1)]
  return np.where(label_keys[row] == source_keys, row, -1)


def _as_bytes(keys: np.ndarray) -> np.ndarray:
  """Text as UTF-8, a quarter of the memory."""
  return np.strings.encode(keys, 'utf-8') if keys.dtype.kind == 'U' else keys


def _open(paths: list[pathlib.Path]) -> list[files.SharedArray]:
  """Maps shards so that worker processes map them too."""
  return [files.SharedArray(files.read_npy(path), path) for path in paths]


def label_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's labels; it exists once the shard is whole."""
  return folder / f'labels_{shard:05d}.npy'


def score_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
  """The file of a shard's cosines."""
  return folder / f'scores_{shard:05d}.npy'


def _cluster(
  config: ml_collections.ConfigDict,
  rows: embeddings.Embeddings,
  folder: pathlib.Path,
  mesh: Mesh,
) -> None:
  """Writes centers.npy and clustering.json; goes on where it was killed."""
  resume = _read_state(folder / _STATE)
  done = len(resume.objective) if resume else 0
  if done:
    _log.info('cluster: continuing after %d iterations', done)
  progress = metrics.Progress(
    'cluster', config.cluster.iterations, unit='it', done=done
  )
  try:
    fit = kmeans.fit(
      rows,
      config.cluster.num_centers,
      iterations=config.cluster.iterations,
      seed=config.seed,
      tolerance=config.cluster.tolerance,
      screening=config.cluster.screening,
      mesh=mesh,
      resume=resume,
      save=functools.partial(_write_state, folder / _STATE),
      progress=lambda i, objective, empty: progress.update(
        i + 1, objective=objective, reseeded=empty
      ),
    )
  except ValueError as e:
    raise errors.UserError(f'cluster.num_centers: {e}') from e
  if fit.skipped:
    places = (rows.locate(row) for row in fit.bad_rows)
    _log.warning(
      '%d zero or non-finite rows were left out: %s',
      fit.skipped,
      ', '.join(f'{path} row {row}' for path, row in places),
    )
  summary = _summary(fit, rows.shape, mesh)
  if distributed.is_main():
    files.write_json(folder / 'clustering.json', summary)
    files.write_npy(folder / 'centers.npy', fit.centers)
    (folder / _STATE).unlink(missing_ok=True)
  distributed.barrier('centers')


def _write_state(path: pathlib.Path, fit: kmeans.Fit) -> None:
  if distributed.is_main():
    files.write_npz(
      path, **{k: np.asarray(v) for k, v in fit._asdict().items()}
    )
  distributed.barrier('clustering state')


def _read_state(path: pathlib.Path) -> kmeans.Fit | None:
  if not path.exists():
    return None
  found = files.read_npz(path)
  for name in ('objective', 'reseeded', 'skipped', 'bad_rows', 'width'):
    found[name] = found[name].tolist()
  return kmeans.Fit(**found)


def _summary(
  fit: kmeans.Fit, shape: tuple[int, int], mesh: Mesh
) -> dict[str, Any]:
  """What clustering.json holds."""
  counts = fit.counts.astype(np.float64)
  return {
    'num_points': shape[0],
    'dim': shape[1],
    'num_centers': len(counts),
    'iterations': len(fit.objective),
    'objective': fit.objective,
    'reseeded': fit.reseeded,
    'skipped_rows': fit.skipped,
    'near_duplicate_centers': _near_duplicates(fit.centers, mesh),
    # faiss's imbalance factor: 1 where all clusters have one size.
    'imbalance': float(
      len(counts) * np.square(counts).sum() / counts.sum() ** 2
    ),
    'size_percentiles': {
      str(p): float(np.percentile(counts, p))
      for p in (0, 1, 10, 50, 90, 99, 100)
    },
  }


def _near_duplicates(centers: np.ndarray, mesh: Mesh) -> int:
  """Centers with another one closer than a cosine of _NEAR_DUPLICATE."""
  if len(centers) < 2:
    return 0
  _, cosines = kmeans.nearest_centers(centers, centers, 2, mesh=mesh)
  return int(np.sum(cosines[:, 1] > _NEAR_DUPLICATE))
