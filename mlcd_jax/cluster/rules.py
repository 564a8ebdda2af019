"""The rules by which centers become the labels of an image.

A rule reads the images as a stream and yields their labels piece by piece, so
that neither has to fit in memory.

To add a rule: write its function, give it a line in `RULES`, and name it in
`RULES` of config/choices.py.

Shapes: N images, V views of an image, K centers, D dimensions, L labels.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import Mesh
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import unit

# Labels int32 [n, L] and scores float32 [n, L] of consecutive images.
Labels = tuple[np.ndarray, np.ndarray]

# Images whose views are united at a time.
_IMAGES = 16_384


class Images(NamedTuple):
  """The embeddings of some images.

  Attributes:
    rows: the images [N, D].
    views: their views [N * V, D], V consecutive rows an image; None if there
      are none.
    num_views: V.
  """

  rows: unit.Rows
  views: unit.Rows | None = None
  num_views: int = 0


def nearest(
  images: Images, centers: np.ndarray, num_labels: int, *, mesh: Mesh
) -> Iterator[Labels]:
  """Gives an image the centers that are nearest to it.

  Args:
    images: the embeddings of N images.
    centers: the centers [K, D].
    num_labels: L.
    mesh: the mesh of all devices.

  Yields:
    For n consecutive images: labels int32 [n, L], the nearest first, ties to
    the lower number; and their cosines float32 [n, L]. A missing label is -1
    and has the cosine 0.
  """
  for labels, scores in kmeans.nearest_in_chunks(
    images.rows, centers, num_labels, mesh=mesh
  ):
    # A row that is zero or not finite has the cosine 0 to every center.
    yield np.where(scores[:, :1] == 0, -1, labels), scores


def views(
  images: Images, centers: np.ndarray, num_labels: int, *, mesh: Mesh
) -> Iterator[Labels]:
  """Gives an image the nearest center of each of its views; see `nearest`.

  A center that is nearest to several views counts once, with its best cosine.
  The best L stay. A view that is zero or not finite gives no label.
  """
  found = kmeans.nearest_in_chunks(images.views, centers, 1, mesh=mesh)
  num_images, each = images.rows.shape[0], images.num_views
  lengths = [
    each * min(_IMAGES, num_images - start)
    for start in range(0, num_images, _IMAGES)
  ]
  for labels, scores in recut(found, lengths, 1):
    yield unite(labels.reshape(-1, each), scores.reshape(-1, each), num_labels)


def pursuit(
  images: Images, centers: np.ndarray, num_labels: int, *, mesh: Mesh
) -> Iterator[Labels]:
  """Gives an image the centers that add up to it; see `kmeans.pursue`.

  With views it takes the mean of their unit rows instead of the image's own
  row. That mean is nearly a sum of the image's parts, which pursuit needs.

  The mean of the centers is subtracted from centers and rows. Otherwise the
  first center explains what all images share, and most other products turn
  negative.

  Returns:
    An iterator over pieces: labels int32 [n, L] in the order in which they were
    taken, then -1; and their coefficients float32 [n, L].
  """
  rows = images.rows
  if images.views is not None:
    rows = _MeanOfViews(images.views, images.num_views)
  mean = unit.unit_rows(centers).mean(axis=0)
  return kmeans.pursue_in_chunks(
    _Centered(rows, mean),
    unit.unit_rows(centers) - mean,
    num_labels,
    mesh=mesh,
  )


class _Centered:
  """Unit rows [N, D] minus a mean, read by slices; bad rows are zero."""

  def __init__(self, rows: unit.Rows, mean: np.ndarray):
    self._rows = rows
    self._mean = mean
    self.shape = rows.shape

  def __getitem__(self, rows: slice) -> np.ndarray:
    found = unit.unit_rows(self._rows[rows])
    return np.where(found.any(axis=1, keepdims=True), found - self._mean, 0)


class _MeanOfViews:
  """The mean of each image's views as rows [N, D], read by slices."""

  def __init__(self, views: unit.Rows, num_views: int):
    self._views = views
    self._each = num_views
    self.shape = (views.shape[0] // num_views, views.shape[1])

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    views = self._views[self._each * start : self._each * stop]
    # A view that is zero or not finite adds nothing.
    views = unit.unit_rows(views)
    return views.reshape(-1, self._each, self.shape[1]).mean(axis=1)


def recut(
  pieces: Iterable[Labels], lengths: Iterable[int], num_labels: int
) -> Iterator[Labels]:
  """Cuts a stream of labels and scores into pieces of other lengths.

  Args:
    pieces: labels and scores [n, L] of consecutive rows.
    lengths: the numbers of rows of the new pieces. Their sum is at most that of
      the old ones.
    num_labels: L.
  """
  pieces = iter(pieces)
  nothing = np.zeros((0, num_labels), np.int32)
  nothing = rest = nothing, nothing.astype(np.float32)
  for length in lengths:
    taken = [nothing]
    while length:
      if not len(rest[0]):
        rest = next(pieces)
      taken.append(tuple(x[:length] for x in rest))
      rest = tuple(x[length:] for x in rest)
      length -= len(taken[-1][0])
    yield tuple(np.concatenate(part) for part in zip(*taken))


def unite(
  labels: np.ndarray, scores: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the different labels of each image, best first.

  Args:
    labels: int32 [N, V], with repeats.
    scores: float32 [N, V], their cosines; 0 for a view that is zero or not
      finite.
    num_labels: L.

  Returns:
    See `nearest`.
  """
  # A missing label sorts last by cosine.
  scores = np.where(scores == 0, -np.inf, scores)
  # Of the repeats of a center the best comes first, and it alone stays.
  labels, scores = _sorted(labels, scores, (-scores, labels))
  repeated = np.zeros(labels.shape, bool)
  repeated[:, 1:] = labels[:, 1:] == labels[:, :-1]
  scores[repeated] = -np.inf
  labels, scores = _sorted(labels, scores, (labels, -scores))
  labels, scores = labels[:, :num_labels], scores[:, :num_labels]
  missing = np.isneginf(scores)
  padding = [(0, 0), (0, num_labels - labels.shape[1])]
  return (
    np.pad(np.where(missing, -1, labels), padding, constant_values=-1),
    np.pad(np.where(missing, 0, scores), padding),
  )


def _sorted(labels, scores, keys) -> tuple[np.ndarray, np.ndarray]:
  """Sorts labels and scores within each image by the last key first."""
  order = np.lexsort(keys, axis=1)
  return tuple(np.take_along_axis(x, order, axis=1) for x in (labels, scores))


RULES: dict[str, Callable[..., Iterator[Labels]]] = {
  'nearest': nearest,
  'views': views,
  'pursuit': pursuit,
}
