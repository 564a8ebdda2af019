"""Agreement of clusters with the true classes of the images.

Shapes: N images, M images whose labels are examined, L labels per image.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn import metrics

# Stands for the class that a label names if it names none.
_NONE = -1


def agreement(clusters: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Returns the purity and the normalised mutual information of clusters.

  The mutual information is divided by the arithmetic mean of both entropies.

  Args:
    clusters: [N], the first label of each image.
    truth: [N], the class of each image.

  Returns:
    The values under `purity` and `nmi`, both from 0 to 1.
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
  """Compares the class that each label names with the image's own class.

  A label of an image names the majority class of the other images in that
  cluster. If there are no others, it names no class.

  Args:
    labels: [M, L] clusters, nearest first; -1 for no label.
    truth: [M], the class of each image.
    members: for each cluster the classes of its images, by row.
    rows: [M], the row of each image.

  Returns:
    A dict. For each rank of the labels, [L], `right` is the share of images
    whose label names their class, `silent` the share whose label names no
    class, and `any` the share for which a label up to this rank names their
    class. `wrong_first` is the share of images whose first label names another
    class. `rescued` is the share of those for which a later label names their
    class, or None if there are none. `images` is M.
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
  """Returns the most frequent class, the lowest of several; None if empty.

  Args:
    members: the classes of images, by row.
  """
  if not members:
    return None
  classes, counts = np.unique(list(members.values()), return_counts=True)
  return int(classes[counts.argmax()])
