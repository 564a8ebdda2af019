"""Retrieval: images by text, texts by image, and images by image.

In a data set with classes, every result of the query's class is correct. In one
without classes, such as Flickr30k and COCO, the correct results of an image are
its captions, and that of a caption is its image.

Shapes: N images, M texts, Q queries, D features, E joint embedding. q is this
device's part of the queries in a batch.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import lit

_RANKS = (1, 5, 10)

# The first captions of each image that are used, as in Karpathy & Fei-Fei
# (2015).
_CAPTIONS = 5

# Queries that a device ranks at a time; it holds [64, N] scores.
_QUERIES_PER_DEVICE = 64


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns recalls and mean average precision on the test split.

  With captions and a text tower the metrics are image_to_text_recall1, 5 and 10
  and text_to_image_recall1, 5 and 10. With classes they are image_recall1 and
  image_map. All have intervals.
  """
  values = {}
  if data.num_classes:
    values |= images(data.test.features, data.test.labels, mesh=data.mesh)
  told = lit.captions(data.test)
  towers = lit.towers(data, config) if any(told) else None
  if towers:
    groups = data.test.labels if data.num_classes else np.arange(len(told))
    texts, text_groups = _texts(told, groups, by_class=bool(data.num_classes))
    rows_NE = towers.images(data.test.features)
    rows_ME = towers.texts(texts)
    for name, queries, query_groups, gallery, gallery_groups in (
      ('image_to_text', rows_NE, groups, rows_ME, text_groups),
      ('text_to_image', rows_ME, text_groups, rows_NE, groups),
    ):
      found = recalls(
        queries, query_groups, gallery, gallery_groups, mesh=data.mesh
      )
      values |= {f'{name}_{metric}': hits for metric, hits in found.items()}
  return {
    f'{name}{suffix}': value
    for name, hits in values.items()
    for suffix, value in intervals.bootstrap(hits, seed=config.seed).items()
  }


def recalls(
  queries_QD: np.ndarray,
  query_groups: np.ndarray,
  gallery_MD: np.ndarray,
  gallery_groups: np.ndarray,
  *,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Checks if the rows nearest to a query by cosine include one of its group.

  Args:
    queries_QD: the rows of the queries; they need not be unit rows.
    query_groups: int [Q].
    gallery_MD: the rows to search; they need not be unit rows.
    gallery_groups: int [M].
    mesh: the mesh of all devices.

  Returns:
    Arrays [Q] of 0 and 1 under 'recall1', 'recall5' and 'recall10': 1 if one of
    that many nearest rows is in the query's group.
  """
  most = min(max(_RANKS), len(gallery_MD))
  found, _ = kmeans.nearest_centers(queries_QD, gallery_MD, most, mesh=mesh)
  right = gallery_groups[found] == query_groups[:, None]
  return {
    f'recall{k}': right[:, :k].any(axis=1).astype(np.float64) for k in _RANKS
  }


def images(
  rows_ND: np.ndarray, labels_N: np.ndarray, *, mesh: Mesh
) -> dict[str, np.ndarray]:
  """Uses each image as a query against all others.

  Images without a class and images that are alone in their class are no
  queries, but others may find them.

  Args:
    rows_ND: the features of the images; they need not be unit rows.
    labels_N: the classes of the images; -1 for none.
    mesh: the mesh of all devices.

  Returns:
    Arrays [Q]: under 'image_recall1' 1 if the nearest image has the query's
    class, else 0, and under 'image_map' the average precision. Empty if there
    are no queries.
  """
  _, place_N, counts = np.unique(
    labels_N, return_inverse=True, return_counts=True
  )
  queries = np.flatnonzero((labels_N >= 0) & (counts[place_N] > 1))
  if not len(queries):
    return {}
  # One of the two nearest is the query itself, unless other images are equal to
  # it.
  two, _ = kmeans.nearest_centers(rows_ND[queries], rows_ND, 2, mesh=mesh)
  other = np.where(two[:, 0] == queries, two[:, 1], two[:, 0])
  first = labels_N[other] == labels_N[queries]
  return {
    'image_recall1': first.astype(np.float64),
    'image_map': _average_precision(rows_ND, labels_N, queries, mesh),
  }


def _average_precision(
  rows_ND: np.ndarray, labels_N: np.ndarray, queries: np.ndarray, mesh: Mesh
) -> np.ndarray:
  """Returns the average precision [Q] of each query's ranking of the others.

  Args:
    rows_ND: the features of the images; they need not be unit rows.
    labels_N: the classes of the images.
    queries: int [Q], the indices of the images to query with.
    mesh: the mesh of all devices.
  """
  rows_ND = unit.unit_rows(rows_ND)
  put_whole = functools.partial(sharding.put, mesh, sharding.REPLICATED)
  gallery = put_whole(rows_ND), put_whole(labels_N.astype(np.int32))
  size = _QUERIES_PER_DEVICE * mesh.size
  out = []
  for i in range(0, len(queries), size):
    part = queries[i : i + size]
    # Padded to one shape, so that `_rank` is compiled once.
    padded = np.resize(part, size).astype(np.int32)
    padded = sharding.put(mesh, sharding.BATCH, padded)
    out.append(sharding.to_host(_rank(*gallery, padded))[: len(part)])
  return np.concatenate(out).astype(np.float64)


@jax.jit
def _rank(rows_ND, labels_N, queries_q):
  """Returns the average precision [q] of some queries' rankings."""
  # In full float32: rounding would swap images of nearly equal scores.
  scores_qN = jnp.dot(
    rows_ND[queries_q], rows_ND.T, precision=jax.lax.Precision.HIGHEST
  )
  own = jnp.arange(len(rows_ND))[None] == queries_q[:, None]
  order_qN = jnp.argsort(jnp.where(own, jnp.inf, -scores_qN), axis=1)
  # The query itself has the key infinity; it comes last and is left out.
  right_qN = labels_N[order_qN[:, :-1]] == labels_N[queries_q][:, None]
  ranks_N = jnp.arange(1, right_qN.shape[1] + 1)
  precision_qN = jnp.cumsum(right_qN, axis=1) / ranks_N[None]
  return jnp.sum(precision_qN * right_qN, axis=1) / jnp.sum(right_qN, axis=1)


def _texts(
  told: list[list[str]], groups: np.ndarray, *, by_class: bool
) -> tuple[list[str], np.ndarray]:
  """Returns the texts to search, and the group of each.

  Args:
    told: the captions of every image.
    groups: int [N], the group of every image.
    by_class: True if the groups are classes; then a text that several images of
      a class share is taken once.
  """
  pairs = [
    (text, int(group))
    for texts, group in zip(told, groups)
    for text in texts[:_CAPTIONS]
  ]
  if by_class:
    pairs = list(dict.fromkeys(pairs))
  return [text for text, _ in pairs], np.array([group for _, group in pairs])
