"""Few-shot linear probe: a few labels per class, drawn several times."""

import ml_collections
import numpy as np

from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import scores
from mlcd_jax.evaluate.tasks import linear

# This protocol is our own; see docs/evaluation.md.
_LABELS_PER_CLASS = 20
_DRAWS = 5


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns the mean test accuracy over the draws with its interval.

  Every draw takes 20 training images of each class, or all if a class has
  fewer, and fits a linear probe on them.
  """
  # The seed is the same for all encoders, so that they get the same images.
  rng = np.random.default_rng(config.seed)
  accuracies = []
  for _ in range(_DRAWS):
    rows = np.concatenate(
      [
        rng.permutation(np.flatnonzero(data.train.labels == c))[
          :_LABELS_PER_CLASS
        ]
        for c in np.unique(data.train.labels)
      ]
    )
    found, _ = linear.predict(
      data.train.features[rows],
      data.train.labels[rows],
      linear.hold_out(len(rows), config.seed),
      data.test.features,
      metric=lambda z, y: scores.right(z, y).mean(),
      num_outputs=data.num_classes,
      mesh=data.mesh,
    )
    accuracies.append(scores.right(found, data.test.labels).mean())
  values = intervals.over_draws(np.asarray(accuracies))
  return {f'accuracy{k}': v for k, v in values.items()}
