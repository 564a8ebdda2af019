"""Retrieval: images by text, texts by image, and images by image.

Correct is what has the query's class, or in data sets without classes what it
was paired with, however many captions an image has (Flickr30k and COCO: five).

Shapes: N images, M texts, Q queries, D features.
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

# Captions of an image that count, as in Karpathy & Fei-Fei (2015).
_CAPTIONS = 5

_QUERIES_PER_DEVICE = 64  # That are ranked at a time.


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns recalls and mean average precision on the test split.

  image_to_text_recall1, 5, 10 and text_to_image_ the same, where there are
  captions and a text tower; image_recall1 and image_map, where there are
  classes.
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
  """Whether something of a query's group is among its nearest.

  Args:
    queries_QD: rows; normalised here, as is the gallery.
    query_groups: int [Q].
    gallery_MD: rows.
    gallery_groups: int [M].
    mesh: of all devices.

  Returns:
    'recall1', 'recall5' and 'recall10': 0 or 1 of every query, [Q].
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
  """Every image as a query for all others; of a class alone it is none.

  Args:
    rows_ND: features.
    labels_N: classes.
    mesh: of all devices.

  Returns:
    'image_recall1', whether the nearest is of the class, and 'image_map',
    average precision, [Q] each.
  """
  _, place_N, counts = np.unique(
    labels_N, return_inverse=True, return_counts=True
  )
  queries = np.flatnonzero((labels_N >= 0) & (counts[place_N] > 1))
  if not len(queries):
    return {}
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
  """Average precision [Q] of the ranking of all other images."""
  rows_ND = unit.unit_rows(rows_ND)
  put_whole = functools.partial(sharding.put, mesh, sharding.REPLICATED)
  gallery = put_whole(rows_ND), put_whole(labels_N.astype(np.int32))
  size = _QUERIES_PER_DEVICE * mesh.size
  out = []
  for i in range(0, len(queries), size):
    part = queries[i : i + size]
    padded = np.resize(part, size).astype(np.int32)
    padded = sharding.put(mesh, sharding.BATCH, padded)
    out.append(sharding.to_host(_rank(*gallery, padded))[: len(part)])
  return np.concatenate(out).astype(np.float64)


@jax.jit
def _rank(rows_ND, labels_N, queries_q):
  """Average precision of some rows' rankings of all others."""
  scores_qN = jnp.dot(
    rows_ND[queries_q], rows_ND.T, precision=jax.lax.Precision.HIGHEST
  )
  own = jnp.arange(len(rows_ND))[None] == queries_q[:, None]
  order_qN = jnp.argsort(jnp.where(own, jnp.inf, -scores_qN), axis=1)
  # The query itself comes last, and is left out.
  right_qN = labels_N[order_qN[:, :-1]] == labels_N[queries_q][:, None]
  ranks_N = jnp.arange(1, right_qN.shape[1] + 1)
  precision_qN = jnp.cumsum(right_qN, axis=1) / ranks_N[None]
  return jnp.sum(precision_qN * right_qN, axis=1) / jnp.sum(right_qN, axis=1)


def _texts(
  told: list[list[str]], groups: np.ndarray, *, by_class: bool
) -> tuple[list[str], np.ndarray]:
  """The texts of the gallery and their groups; a class has each text once."""
  pairs = [
    (text, int(group))
    for texts, group in zip(told, groups)
    for text in texts[:_CAPTIONS]
  ]
  if by_class:
    pairs = list(dict.fromkeys(pairs))
  return [text for text, _ in pairs], np.array([group for _, group in pairs])
