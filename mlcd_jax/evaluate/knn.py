"""kNN classification, weighted as DINO's (Caron et al. 2021, eval_knn.py)."""

import numpy as np

from mlcd_jax import kmeans
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import statistics

_NEIGHBOURS = (10, 20, 100, 200)
_TEMPERATURE = 0.07


def run(features: features_lib.Features, *, seed: int) -> dict[str, float]:
  """Returns test accuracy for every k, and as `accuracy` that of k = 10."""
  most = min(max(_NEIGHBOURS), len(features.train))
  neighbours, cosines = kmeans.nearest_centers(
    features.test, features.train, most
  )
  out = {}
  for k in _NEIGHBOURS:
    if k > most:
      continue
    votes = np.zeros((len(features.test), features.num_classes))
    for i in range(k):
      label = features.train_labels[neighbours[:, i]]
      weight = np.exp(cosines[:, i] / _TEMPERATURE)
      votes[np.arange(len(votes)), label] += weight
    right = (votes.argmax(1) == features.test_labels).astype(np.float64)
    scores = statistics.bootstrap(right, seed=seed)
    name = 'accuracy' if k == _NEIGHBOURS[0] else f'accuracy_k{k}'
    out |= {f'{name}{suffix}': v for suffix, v in scores.items()}
  return out
