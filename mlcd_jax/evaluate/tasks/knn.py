"""Classification by weighted nearest neighbours, as in DINO's eval_knn.py.

A neighbour votes for its class with the weight exp(cosine / temperature) (Caron
et al. 2021).
"""

import ml_collections
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import intervals

# The values of k and the temperature are the defaults of eval_knn.py.
_NEIGHBOURS = (10, 20, 100, 200)
_TEMPERATURE = 0.07


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns the test accuracy for every k, with its interval.

  The metric is `accuracy` for k = 10 and `accuracy_k<k>` for the others. A k
  above the number of training images is left out.
  """
  most = min(max(_NEIGHBOURS), len(data.train))
  neighbours, cosines = kmeans.nearest_centers(
    data.test.features, data.train.features, most, mesh=data.mesh
  )
  classes, place = np.unique(data.train.labels, return_inverse=True)
  votes = np.zeros((len(data.test), len(classes)))
  out = {}
  # One neighbour of every image votes at a time, so each k adds to the last.
  for k in range(1, most + 1):
    voted = place[neighbours[:, k - 1]]
    weight = np.exp(cosines[:, k - 1] / _TEMPERATURE)
    votes[np.arange(len(votes)), voted] += weight
    if k not in _NEIGHBOURS:
      continue
    right = classes[votes.argmax(1)] == data.test.labels
    scores = intervals.bootstrap(right.astype(np.float64), seed=config.seed)
    name = 'accuracy' if k == _NEIGHBOURS[0] else f'accuracy_k{k}'
    out |= {f'{name}{suffix}': v for suffix, v in scores.items()}
  return out
