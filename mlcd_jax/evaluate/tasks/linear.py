"""Linear probe: logistic regression on frozen features.

As CLIP's (Radford et al. 2021, A.3) and MLCD's (A.1.4): an L2 penalty that is
searched for on a validation split, then a fit on training and validation rows
together. Every fit is converged, by Newton's method where theirs was L-BFGS.
Features are used as they come.

Shapes: N rows, D features, C classes, M test rows.
"""

from collections.abc import Callable
import functools
import logging

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import logistic
from mlcd_jax.evaluate import scores
from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# Base-10 exponents of penalties as `logistic` has them. Around the best one the
# step is halved from two decades to an eighth of one; no step leaves the range.
_FIRST = np.arange(-6.0, 7.0, 2.0)
_HALVINGS = 4

_HELD_OUT = 0.2

# By name in evaluate.datasets.<name>.metric: what of logits and labels is
# resampled, and what is computed of that and the labels.
_METRICS = {
  'accuracy': (scores.right, scores.mean),
  'mean_per_class': (scores.right, scores.mean_per_class),
  'mean_top1_top5': (scores.top1_top5, scores.mean),
  'roc_auc': (lambda z, y: z[:, 1] - z[:, 0], scores.roc_auc),
  'map_11_point': (
    lambda z, y: z,
    functools.partial(
      scores.mean_average_precision, of=scores.average_precision_11
    ),
  ),
}


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns the data set's metric on the test split, with its interval.

  Beside them what `predict` says of the fit. Nothing where the images do not
  have the labels of that metric.
  """
  name = data.config.get('metric', 'accuracy')
  several = name == 'map_11_point'
  if not several and not data.num_classes:
    return {}
  y, held, test_y = targets(data, config.seed, several=several)
  if y is None:
    return {}
  items, metric = _METRICS[name]
  found, fitted = predict(
    training_rows(data),
    y,
    held,
    data.test.features,
    metric=lambda z, y: metric(items(z, y), y),
    num_outputs=y.shape[1] if several else data.num_classes,
    loss='sigmoid' if several else 'softmax',
    mesh=data.mesh,
  )
  values = intervals.bootstrap_of(
    metric, items(found, test_y), test_y, seed=config.seed
  )
  return {f'{name}{k}': v for k, v in values.items()} | fitted


def training_rows(data: features.Data) -> np.ndarray:
  """Features of training and validation rows together."""
  if data.validation is None:
    return data.train.features
  return np.concatenate([data.train.features, data.validation.features])


def targets(
  data: features.Data, seed: int, *, several: bool
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
  """What is to be predicted.

  Args:
    data: see `features.Data`.
    seed: of the validation split that is made where there is none.
    several: labels an image; otherwise its class.

  Returns:
    int [N], or [N, C] as `Split.hot`, of `training_rows`; which of them are
    held out for the penalty; and those of the test rows. None without such
    labels.
  """
  splits = [data.train, data.validation, data.test]
  if several:
    ys = [s and s.hot() for s in splits]
    if ys[0] is None:
      return None, None, None
  else:
    ys = [s and s.labels for s in splits]
  if data.validation is None:
    held = hold_out(len(data.train), seed)
    return ys[0], held, ys[2]
  held = np.arange(len(ys[0]) + len(ys[1])) >= len(ys[0])
  return np.concatenate(ys[:2]), held, ys[2]


def hold_out(num_rows: int, seed: int) -> np.ndarray:
  """Bool [N]: a random fifth."""
  held = np.zeros(num_rows, bool)
  order = np.random.default_rng(seed).permutation(num_rows)
  held[order[: max(1, round(_HELD_OUT * num_rows))]] = True
  return held


def predict(
  x_ND: np.ndarray,
  y: np.ndarray,
  held_N: np.ndarray,
  test_MD: np.ndarray,
  *,
  metric: Callable[[np.ndarray, np.ndarray], float],
  num_outputs: int,
  mesh: Mesh,
  loss: str = 'softmax',
) -> tuple[np.ndarray, dict[str, float]]:
  """Chooses the penalty, fits on all rows and scores the test rows.

  Args:
    x_ND: training and validation features.
    y: their classes, or [N, C] as `Split.hot`.
    held_N: bool, the validation rows.
    test_MD: features.
    metric: (scores, y) -> value, of which the highest is best.
    num_outputs: C.
    mesh: of all devices.
    loss: see `logistic.fit`.

  Returns:
    Logits float32 [M, C]; and the fit: `penalty`, 1 / C of scikit-learn, and
    `objective`, `iterations` and `converged` (0 or 1) as `logistic.Model`.

  Raises:
    UserError: there are no rows to fit on.
  """
  if held_N.all():
    raise errors.UserError(
      f'evaluate.datasets: {len(y)} training images; a probe needs at least 2'
    )
  rows = logistic.prepare(x_ND, mesh, num_outputs=num_outputs)
  models = {}

  def fit(exponent, weight_N):
    nearest = min(models, key=lambda e: abs(e - exponent), default=None)
    return logistic.fit(
      rows, y, weight_N, 10.0**exponent, loss=loss, start=models.get(nearest)
    )

  def values(exponents):
    # From the strongest penalty on, since each model is the next one's start.
    for exponent in sorted(exponents, reverse=True):
      models[exponent] = fit(exponent, ~held_N)
    return [
      metric(x_ND[held_N] @ models[e].weight_DC + models[e].bias_C, y[held_N])
      for e in exponents
    ]

  best = search(values)
  model = fit(best, np.ones(len(y)))
  stopped = sum(not m.converged for m in [*models.values(), model])
  if stopped:
    _log.warning(
      'the linear probe: %d of %d fits stopped at %d iterations, before they '
      'converged',
      stopped,
      len(models) + 1,
      logistic.MAX_ITERATIONS,
    )
  fitted = {
    'penalty': float(10.0**best),
    'objective': model.objective,
    'iterations': model.iterations,
    'converged': int(model.converged),
  }
  return test_MD @ model.weight_DC + model.bias_C, fitted


def search(values: Callable[[np.ndarray], list[float]]) -> float:
  """CLIP's parametric search for the best penalty.

  Args:
    values: base-10 exponents -> values, higher is better.

  Returns:
    The exponent, the greatest of those that are equally good.
  """
  tried = dict(zip(_FIRST, values(_FIRST)))

  def best():
    return max(tried, key=lambda e: (np.nan_to_num(tried[e], nan=-1), e))

  step = _FIRST[1] - _FIRST[0]
  for _ in range(_HALVINGS):
    step /= 2
    around = best() + np.array([-step, step])
    around = around[np.abs(around) <= _FIRST[-1]]
    tried |= dict(zip(around, values(around)))
  return best()
