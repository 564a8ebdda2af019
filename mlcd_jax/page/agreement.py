"""How well clusters agree with true labels.

Shapes: N images, M images asked about, L labels, K clusters, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn import metrics

_NONE = -1


def agreement(clusters: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Purity and normalised mutual information (arithmetic mean).

  Args:
    clusters: [N], the first label.
    truth: [N], the class.
  """
  table = metrics.cluster.contingency_matrix(clusters, truth, sparse=True)
  return {
    'purity': float(table.max(axis=1).sum() / len(truth)),
    'nmi': float(metrics.normalized_mutual_info_score(clusters, truth)),
  }


def ranks(
  labels: np.ndarray,
  truth: np.ndarray,
  members: Mapping[int, Mapping[int, int]],
  rows: np.ndarray,
) -> dict[str, Any]:
  """What each of an image's labels says of its class.

  A label names the class that most of its cluster's images have, the image
  itself left out; a cluster without another image names none.

  Args:
    labels: [M, L] clusters, nearest first; -1 where there is none.
    truth: [M], the class.
    members: cluster -> {row: class} of its images.
    rows: [M], the row of each image.

  Returns:
    `right` and `silent` [L]: share of the images whose label of that rank
    names their class, or none; `any` [L]: share for which one up to that rank
    names it; `wrong_first`: share whose first label names another class;
    `rescued`: share of these for which a later one names theirs; `images`: M.
  """
  named = np.full(labels.shape, _NONE)
  for i, (row, clusters) in enumerate(zip(rows.tolist(), labels.tolist())):
    for rank, cluster in enumerate(clusters):
      others = {r: x for r, x in members.get(cluster, {}).items() if r != row}
      if others:
        named[i, rank] = majority(others)
  right, silent = named == truth[:, None], named == _NONE
  known = np.logical_or.accumulate(right, axis=1)
  wrong = ~right[:, 0] & ~silent[:, 0]
  return {
    'right': right.mean(axis=0).tolist(),
    'silent': silent.mean(axis=0).tolist(),
    'any': known.mean(axis=0).tolist(),
    'wrong_first': float(wrong.mean()),
    'rescued': float(known[wrong, -1].mean()) if wrong.any() else None,
    'images': len(labels),
  }


def majority(members: Mapping[int, int]) -> int | None:
  """The class most images have, of equals the lower; None without images."""
  if not members:
    return None
  classes, counts = np.unique(list(members.values()), return_counts=True)
  return int(classes[counts.argmax()])
