"""Several labels an image: mAP, CF1 and OF1 of a one-vs-rest linear probe.

An attribute counts as predicted above a probability of one half (Chen et al.
2019, ML-GCN, section 4.1, with the usual threshold).
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
  """Returns mAP, CF1 and OF1, and what `linear.predict` says of the fit.

  Nothing where images have one label only.
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
  return scores.f1(logits_MC > 0, hot_MC, per_class=per_class)
