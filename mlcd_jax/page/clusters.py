"""Statistics of all clusters, and the images of a bounded sample of them.

The page reads the label shards several times, never all at once: for the sizes
and cosines of all clusters, and for the images nearest to the centers of the
clusters that it shows.

Shapes: N images, C clusters, L labels, D dimensions.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import pathlib

import numpy as np

from mlcd_jax.cluster import labels as labels_lib
from mlcd_jax.runtime import files

_PER_GROUP = 16  # Clusters shown of each kind.
# Near duplicates are searched for this many centers, a random sample of more.
_MAX_COMPARED = 4_096
# Centers that these are compared with at a time: 128 MiB of cosines.
_CHUNK = 8_192

# The edges of the 100 bins of cosines.
COSINE_EDGES = np.linspace(-1, 1, 101)


@dataclasses.dataclass(frozen=True)
class Shards:
  """The label and score files of a finished cluster stage.

  Attributes:
    folder: the folder of the cluster stage.
    rows: the number of rows of each shard.
  """

  folder: pathlib.Path
  rows: Sequence[int]

  def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the first row, labels [n, L] and cosines [n, L] of each shard."""
    start = 0
    for shard, count in enumerate(self.rows):
      yield (
        start,
        files.read_npy(labels_lib.label_path(self.folder, shard)),
        files.read_npy(labels_lib.score_path(self.folder, shard)),
      )
      start += count

  @property
  def num_images(self) -> int:
    """The number of images N, including those without a label."""
    return sum(self.rows)

  def at(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels [n, L] and cosines [n, L] of the given rows [n]."""
    found = {}
    for start, labels, cosines in self:
      for row in wanted[(wanted >= start) & (wanted < start + len(labels))]:
        found[row] = labels[row - start], cosines[row - start]
    pairs = [found[row] for row in wanted]
    return tuple(np.stack(part) for part in zip(*pairs))


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Statistics of all clusters; an image belongs to that of its first label.

  Attributes:
    sizes: int64 [C], the number of images.
    cosines: float64 [C], the mean cosine of the images to the center; 0 for an
      empty cluster.
    histogram: int64 [100], the number of all images by cosine; the bins lie
      between COSINE_EDGES.
  """

  sizes: np.ndarray
  cosines: np.ndarray
  histogram: np.ndarray


def statistics(shards: Shards, num_clusters: int) -> Statistics:
  """Computes the statistics; it leaves out images without a label.

  Args:
    shards: the labels and cosines of all images.
    num_clusters: C.
  """
  sizes = np.zeros(num_clusters, np.int64)
  sums = np.zeros(num_clusters)
  histogram = np.zeros(len(COSINE_EDGES) - 1, np.int64)
  for _, labels, cosines in shards:
    has_label = labels[:, 0] >= 0
    first = labels[has_label, 0]
    cosine = cosines[has_label, 0].astype(np.float64)
    sizes += np.bincount(first, minlength=num_clusters)
    sums += np.bincount(first, cosine, minlength=num_clusters)
    # Cosines are stored as float16, which may round them to above 1.
    histogram += np.histogram(np.clip(cosine, -1, 1), COSINE_EDGES)[0]
  return Statistics(sizes, sums / np.maximum(sizes, 1), histogram)


def size_histogram(sizes: np.ndarray) -> list[list[int]]:
  """Returns [smallest size, largest size, number of clusters] of every bin.

  The bins are the sizes 0, 1, 2 to 3, 4 to 7 and so on.
  """
  # The bin is 0 for an empty cluster. For others frexp gives the number of
  # binary digits of the size.
  bins = np.where(sizes > 0, np.frexp(sizes)[1], 0)
  return [
    [1 << b >> 1, (1 << b) - 1, int(count)]
    for b, count in enumerate(np.bincount(bins))
  ]


def choose(found: Statistics, seed: int) -> dict[str, np.ndarray]:
  """Returns the clusters to show, by kind; a cluster may be of several kinds.

  Args:
    found: the statistics of all clusters.
    seed: the seed of the random clusters.
  """
  full = np.flatnonzero(found.sizes)
  by_size = full[np.argsort(found.sizes[full], kind='stable')]
  # A single image lies on its center, so its cosine of 1 tells nothing.
  several = full[found.sizes[full] > 1]
  by_cosine = several[np.argsort(found.cosines[several], kind='stable')]
  middle = max(0, (len(full) - _PER_GROUP) // 2)
  some = min(_PER_GROUP, len(full))
  return {
    'largest': by_size[::-1][:_PER_GROUP],
    'median size': by_size[middle : middle + _PER_GROUP],
    'smallest': by_size[:_PER_GROUP],
    'tightest': by_cosine[::-1][:_PER_GROUP],
    'loosest': by_cosine[:_PER_GROUP],
    'random': np.random.default_rng(seed).choice(full, some, replace=False),
  }


def members(
  shards: Shards,
  clusters: np.ndarray,
  num_clusters: int,
  *,
  count: int | None = None,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """Returns the images of some clusters that are nearest to the centers.

  Args:
    shards: the labels and cosines of all images.
    clusters: the numbers of the clusters, each once.
    num_clusters: C.
    count: the most images per cluster; None takes all.

  Returns:
    For each cluster the rows and the cosines of its images, nearest first.
  """
  slots = np.full(num_clusters, -1, np.int32)
  slots[clusters] = np.arange(len(clusters))
  best = np.zeros(0, [('slot', 'i4'), ('cosine', 'f4'), ('row', 'i8')])
  for start, labels, cosines in shards:
    slot = np.where(labels[:, 0] >= 0, slots[labels[:, 0]], -1)
    places = np.flatnonzero(slot >= 0)
    new = np.zeros(len(places), best.dtype)
    new['slot'], new['row'] = slot[places], places + start
    new['cosine'] = cosines[places, 0]
    # Cut after each shard, so that memory does not grow with their number.
    best = _nearest(np.concatenate([best, new]), count)
  ends = np.searchsorted(best['slot'], np.arange(len(clusters) + 1))
  return {
    int(cluster): (best['row'][a:b], best['cosine'][a:b])
    for cluster, a, b in zip(clusters, ends, ends[1:])
  }


def _nearest(found: np.ndarray, count: int | None) -> np.ndarray:
  """Sorts images by cluster and cosine, and keeps `count` of each cluster."""
  found = found[np.lexsort((found['row'], -found['cosine'], found['slot']))]
  first = np.searchsorted(found['slot'], found['slot'])
  rank = np.arange(len(found)) - first
  return found if count is None else found[rank < count]


def near_duplicates(
  centers: np.ndarray,
  *,
  count: int,
  seed: int,
  max_compared: int = _MAX_COMPARED,
  chunk: int = _CHUNK,
) -> list[tuple[int, int, float]]:
  """Returns pairs of centers with high cosines.

  Each center is paired with the one nearest to it. With more than
  `max_compared` centers it does this for a random sample, so it may miss the
  closest pairs.

  Args:
    centers: [C, D] unit rows.
    count: the most pairs to return.
    seed: the seed of the sample.
    max_compared: the size of the sample.
    chunk: the centers whose cosines are computed at a time.

  Returns:
    Tuples (center, center, cosine), the closest pair first.
  """
  total = len(centers)
  among = np.arange(total)
  if total > max_compared:
    among = np.random.default_rng(seed).choice(
      total, max_compared, replace=False
    )
  rows = np.asarray(centers[np.sort(among)], np.float32)
  among = np.sort(among)
  best = np.full(len(among), -np.inf)
  other = np.zeros(len(among), np.int64)
  for start in range(0, total, chunk):
    cosine = rows @ np.asarray(centers[start : start + chunk], np.float32).T
    own = among - start
    inside = np.flatnonzero((own >= 0) & (own < cosine.shape[1]))
    cosine[inside, own[inside]] = -np.inf
    place = cosine.argmax(axis=1)
    value = cosine[np.arange(len(among)), place]
    other = np.where(value > best, start + place, other)
    best = np.maximum(best, value)
  pairs = {}
  # Twice as many, since a pair is found from each of its two centers.
  for i in np.argsort(-best)[: 2 * count]:
    if np.isfinite(best[i]):
      pair = sorted((int(among[i]), int(other[i])))
      pairs.setdefault(tuple(pair), float(best[i]))
  return [(*pair, cosine) for pair, cosine in pairs.items()][:count]
