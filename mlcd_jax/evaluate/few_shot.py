"""Few-shot linear probe: a few labels a class, drawn several times."""

import numpy as np

from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import linear
from mlcd_jax.evaluate import statistics

_LABELS_PER_CLASS = 20
_DRAWS = 5


def run(features: features_lib.Features, *, seed: int) -> dict[str, float]:
  """Returns mean test accuracy over the draws with its interval."""
  rng = np.random.default_rng(seed)
  accuracies = []
  for _ in range(_DRAWS):
    rows = np.concatenate(
      [
        rng.permutation(np.flatnonzero(features.train_labels == c))[
          :_LABELS_PER_CLASS
        ]
        for c in range(features.num_classes)
      ]
    )
    predicted = linear.predict(
      features.train[rows],
      features.train_labels[rows],
      features.test,
      num_classes=features.num_classes,
      seed=seed,
    )
    accuracies.append((predicted == features.test_labels).mean())
  scores = statistics.over_draws(np.asarray(accuracies))
  return {f'accuracy{k}': v for k, v in scores.items()}
