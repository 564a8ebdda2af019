"""Multi-label classification: mAP, CF1 and OF1 of a one-vs-rest linear probe.

The metrics are those of ML-GCN (Chen et al. 2019, section 4.1). An attribute is
predicted if its probability is above 0.5.
"""

import functools

import ml_collections
import numpy as np

from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import scores
from mlcd_jax.evaluate.tasks import linear


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns mAP, CF1 and OF1 on the test split, with their intervals.

  The dict also has the values of `linear.predict` that describe the fit. It is
  empty if the images do not have several labels.
  """
  y, held, test_y = linear.targets(data, config.seed, several=True)
  if y is None:
    return {}
  found, fitted = linear.predict(
    linear.training_rows(data),
    y,
    held,
    data.test.features,
    metric=scores.mean_average_precision,
    num_outputs=y.shape[1],
    loss='sigmoid',
    mesh=data.mesh,
  )
  out = dict(fitted)
  for name, metric in {
    'mAP': scores.mean_average_precision,
    'CF1': functools.partial(_f1, per_class=True),
    'OF1': functools.partial(_f1, per_class=False),
  }.items():
    values = intervals.bootstrap_of(metric, found, test_y, seed=config.seed)
    out |= {f'{name}{k}': v for k, v in values.items()}
  return out


def _f1(logits_MC: np.ndarray, hot_MC: np.ndarray, *, per_class: bool) -> float:
  """Returns the F1 score at a probability of 0.5, which is a logit of 0."""
  return scores.f1(logits_MC > 0, hot_MC, per_class=per_class)
