"""Linear probe: logistic regression on frozen features.

The protocol is that of CLIP (Radford et al. 2021, A.3) and MLCD (A.1.4). It
searches for the L2 penalty that is best on a validation split, then fits on
training and validation rows together. CLIP stops L-BFGS after 1,000 iterations;
here every fit runs to convergence, by Newton's method. Features are not
normalised.

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

# CLIP's search (Radford et al. 2021, A.3) in base-10 exponents of the penalty.
# The first exponents are two decades apart. Then the step around the best one
# is halved four times, to an eighth of a decade, without leaving the range.
_FIRST = np.arange(-6.0, 7.0, 2.0)
_HALVINGS = 4

# The share of the training rows to choose the penalty on, if the data set has
# no validation split.
_HELD_OUT = 0.2

# The metrics by their names in evaluate.datasets.<name>.metric. The first
# function maps logits and labels to one value or row per item, which the
# bootstrap resamples. The second maps these and the labels to the metric.
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

  The dict also has the values of `predict` that describe the fit. It is empty
  if the images lack the labels that the metric needs.
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
  """Returns the features of the training rows and then the validation rows."""
  if data.validation is None:
    return data.train.features
  return np.concatenate([data.train.features, data.validation.features])


def targets(
  data: features.Data, seed: int, *, several: bool
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
  """Returns the labels to fit and to score.

  Args:
    data: the data of the task.
    seed: the seed of the rows to hold out if there is no validation split.
    several: True for several labels per image, False for its class.

  Returns:
    The labels of `training_rows`, int [N] or, as from `Split.hot`, [N, C]; bool
    [N], the rows held out to choose the penalty; and the labels of the test
    rows. All are None if `several` is True and the images have one label each.
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
  """Returns bool [N]: True for a random fifth of the rows, but at least one."""
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
  """Chooses the penalty, fits on all rows and returns the test rows' logits.

  Args:
    x_ND: the features of the training and validation rows.
    y: their classes [N] or, as from `Split.hot`, labels [N, C].
    held_N: bool, True for the validation rows.
    test_MD: the features of the test rows.
    metric: a function (logits, labels) -> value, higher is better. It chooses
      the penalty.
    num_outputs: C.
    mesh: the mesh of all devices.
    loss: see `logistic.fit`.

  Returns:
    The logits float32 [M, C], and a dict that describes the last fit. It has
    the `penalty`, which is 1 / C of scikit-learn, and the `objective`, the
    `iterations` and `converged` (0 or 1) of `logistic.Model`.

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
    # The model with the nearest penalty saves iterations as the start.
    nearest = min(models, key=lambda e: abs(e - exponent), default=None)
    return logistic.fit(
      rows, y, weight_N, 10.0**exponent, loss=loss, start=models.get(nearest)
    )

  def values(exponents):
    # The strongest penalty comes first: its fit is the closest to the model
    # without features. Each fit is then the start of the next.
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
  """Searches for the exponent of the best penalty, as CLIP does.

  Args:
    values: a function from base-10 exponents to their values, higher is better.

  Returns:
    The best exponent; of equally good ones the greatest.
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
