"""A bounded sample of the clusters, whatever their number.

Two passes over the label shards: sizes and cosines of all clusters, then the
images nearest to the centers of those that are shown.

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
# Above this many centers, near duplicates are sought of so many of them.
_MAX_COMPARED = 4_096
_CHUNK = 8_192  # Centers compared with at a time.

COSINE_EDGES = np.linspace(-1, 1, 101)


@dataclasses.dataclass(frozen=True)
class Shards:
  """The label and score files of a finished cluster stage.

  Attributes:
    folder: of the cluster stage.
    rows: of each shard.
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
    """N."""
    return sum(self.rows)

  def at(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels [n, L] and cosines [n, L] of some rows, in their order."""
    found = {}
    for start, labels, cosines in self:
      for row in wanted[(wanted >= start) & (wanted < start + len(labels))]:
        found[row] = labels[row - start], cosines[row - start]
    pairs = [found[row] for row in wanted]
    return tuple(np.stack(part) for part in zip(*pairs))


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Of all clusters, by the first label.

  Attributes:
    sizes: int64 [C].
    cosines: float64 [C], mean over the images; 0 where there are none.
    histogram: int64 [100], images by cosine between COSINE_EDGES.
  """

  sizes: np.ndarray
  cosines: np.ndarray
  histogram: np.ndarray


def statistics(shards: Shards, num_clusters: int) -> Statistics:
  """Counts every image once; those whose row was left out have no label."""
  sizes = np.zeros(num_clusters, np.int64)
  sums = np.zeros(num_clusters)
  histogram = np.zeros(len(COSINE_EDGES) - 1, np.int64)
  for _, labels, cosines in shards:
    has_label = labels[:, 0] >= 0
    first = labels[has_label, 0]
    cosine = cosines[has_label, 0].astype(np.float64)
    sizes += np.bincount(first, minlength=num_clusters)
    sums += np.bincount(first, cosine, minlength=num_clusters)
    # Float16 cosines may be above 1 by their rounding.
    histogram += np.histogram(np.clip(cosine, -1, 1), COSINE_EDGES)[0]
  return Statistics(sizes, sums / np.maximum(sizes, 1), histogram)


def size_histogram(sizes: np.ndarray) -> list[list[int]]:
  """Returns [from, to, clusters] of sizes 0, 1, 2-3, 4-7 and so on."""
  # 0 for empty clusters, then one more than the power of two below.
  bins = np.where(sizes > 0, np.frexp(sizes)[1], 0)
  return [
    [1 << b >> 1, (1 << b) - 1, int(count)]
    for b, count in enumerate(np.bincount(bins))
  ]


def choose(found: Statistics, seed: int) -> dict[str, np.ndarray]:
  """Returns the clusters to show, by kind; some may be of several kinds."""
  full = np.flatnonzero(found.sizes)
  by_size = full[np.argsort(found.sizes[full], kind='stable')]
  # One image lies on its center; that says nothing.
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
  """The images nearest to some centers, of those whose first label they are.

  Args:
    shards: of all images.
    clusters: numbers, each once.
    num_clusters: C.
    count: images of each at most; all where not given.

  Returns:
    cluster -> rows and cosines, nearest first.
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
    best = _nearest(np.concatenate([best, new]), count)
  ends = np.searchsorted(best['slot'], np.arange(len(clusters) + 1))
  return {
    int(cluster): (best['row'][a:b], best['cosine'][a:b])
    for cluster, a, b in zip(clusters, ends, ends[1:])
  }


def _nearest(found: np.ndarray, count: int | None) -> np.ndarray:
  """Sorted by cluster and cosine, with `count` of each cluster left."""
  found = found[np.lexsort((found['row'], -found['cosine'], found['slot']))]
  first = np.searchsorted(found['slot'], found['slot'])
  rank = np.arange(len(found)) - first
  return found if count is None else found[rank < count]


def near_duplicates(
  centers: np.ndarray, *, count: int, seed: int
) -> list[tuple[int, int, float]]:
  """The pairs of centers with the highest cosines.

  Args:
    centers: [C, D] unit rows.
    count: pairs at most.
    seed: of the centers compared with all, where there are too many.

  Returns:
    (center, center, cosine), the closest first.
  """
  total = len(centers)
  among = np.arange(total)
  if total > _MAX_COMPARED:
    among = np.random.default_rng(seed).choice(
      total, _MAX_COMPARED, replace=False
    )
  rows = np.asarray(centers[np.sort(among)], np.float32)
  among = np.sort(among)
  best = np.full(len(among), -np.inf)
  other = np.zeros(len(among), np.int64)
  for start in range(0, total, _CHUNK):
    cosine = rows @ np.asarray(centers[start : start + _CHUNK], np.float32).T
    own = among - start
    inside = np.flatnonzero((own >= 0) & (own < cosine.shape[1]))
    cosine[inside, own[inside]] = -np.inf
    place = cosine.argmax(axis=1)
    value = cosine[np.arange(len(among)), place]
    other = np.where(value > best, start + place, other)
    best = np.maximum(best, value)
  pairs = {}
  for i in np.argsort(-best)[: 2 * count]:  # Each may be found twice.
    if np.isfinite(best[i]):
      pair = sorted((int(among[i]), int(other[i])))
      pairs.setdefault(tuple(pair), float(best[i]))
  return [(*pair, cosine) for pair, cosine in pairs.items()][:count]
