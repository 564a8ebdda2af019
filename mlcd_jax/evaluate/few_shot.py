"""Few-shot linear probe: a few labels a class, drawn several times."""

import ml_collections
import numpy as np

from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import linear
from mlcd_jax.evaluate import statistics

_LABELS_PER_CLASS = 20
_DRAWS = 5


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns mean test accuracy over the draws with its interval."""
  rng = np.random.default_rng(config.seed)
  accuracies = []
  for _ in range(_DRAWS):
    rows = np.concatenate(
      [
        rng.permutation(np.flatnonzero(data.train.labels == c))[
          :_LABELS_PER_CLASS
        ]
        for c in range(data.num_classes)
      ]
    )
    predicted = linear.predict(
      data.train.features[rows],
      data.train.labels[rows],
      data.test.features,
      num_classes=data.num_classes,
      seed=config.seed,
    )
    accuracies.append((predicted == data.test.labels).mean())
  scores = statistics.over_draws(np.asarray(accuracies))
  return {f'accuracy{k}': v for k, v in scores.items()}
