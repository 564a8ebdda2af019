"""Linear probe: multinomial logistic regression on frozen features.

L-BFGS with an L2 penalty, as CLIP's probe (Radford et al. 2021, A.3). The
penalty is chosen on a held-out fifth of the training rows; the final fit uses
all of them.

Shapes: N rows, D features, C classes.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import statistics

# Of mean cross-entropy plus half the penalty times the squared weights, on
# standardised features divided by the square root of their number.
_PENALTIES = np.logspace(-1, -8, 8)

_MAX_ITERATIONS = 200
_GRADIENT_TOLERANCE = 1e-5
_HELD_OUT = 0.2


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns test accuracy with its interval."""
  predicted = predict(
    data.train.features,
    data.train.labels,
    data.test.features,
    num_classes=data.num_classes,
    seed=config.seed,
  )
  right = (predicted == data.test.labels).astype(np.float64)
  scores = statistics.bootstrap(right, seed=config.seed)
  return {f'accuracy{k}': v for k, v in scores.items()}


def predict(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  *,
  num_classes: int,
  seed: int,
) -> np.ndarray:
  """Fits a probe and predicts the test rows' classes.

  Args:
    train: [N, D].
    train_labels: int [N].
    test: [M, D].
    num_classes: C.
    seed: of the split that chooses the penalty.

  Returns:
    int [M].
  """
  mean, std = train.mean(0), train.std(0) + 1e-6
  scale = std * np.sqrt(train.shape[1])
  train, test = (train - mean) / scale, (test - mean) / scale
  order = np.random.default_rng(seed).permutation(len(train))
  held = order[: max(1, round(_HELD_OUT * len(train)))]
  weight = np.ones(len(train))
  weight[held] = 0
  best_accuracy, best_penalty, model = -1.0, None, None
  for penalty in _PENALTIES:  # Of equals the largest stays.
    model = fit(
      train, train_labels, weight, num_classes, penalty=penalty, start=model
    )
    right = _classes(model, train[held]) == train_labels[held]
    if right.mean() > best_accuracy:
      best_accuracy, best_penalty = right.mean(), penalty
  model = fit(
      train, train_labels, np.ones(len(train)), num_classes,
      penalty=best_penalty,
  )  # fmt: skip
  return _classes(model, test)


def fit(
  x_ND: np.ndarray,
  y_N: np.ndarray,
  weight_N: np.ndarray,
  num_classes: int,
  *,
  penalty: float,
  start: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Minimises mean cross-entropy plus penalty / 2 times the squared weights.

  Args:
    x_ND: features.
    y_N: int classes.
    weight_N: of every row; 0 leaves it out without a change of shape.
    num_classes: C.
    penalty: the bias is free of it.
    start: a model to start from; zeros where not given.

  Returns:
    weight float32 [D, C] and bias [C].
  """
  if start is None:
    start = {
      'weight': np.zeros((x_ND.shape[1], num_classes), np.float32),
      'bias': np.zeros(num_classes, np.float32),
    }
  model = _fit(
    jnp.asarray(x_ND, jnp.float32),
    jnp.asarray(y_N, jnp.int32),
    jnp.asarray(weight_N, jnp.float32),
    jnp.float32(penalty),
    start,
  )
  return jax.tree.map(np.asarray, model)


def _classes(model: dict[str, np.ndarray], x_ND: np.ndarray) -> np.ndarray:
  return np.argmax(x_ND @ model['weight'] + model['bias'], axis=-1)


@jax.jit
def _fit(x_ND, y_N, weight_N, penalty, model):
  """L-BFGS until the gradient vanishes or the iterations run out."""

  def objective(model):
    logits_NC = x_ND @ model['weight'] + model['bias'][None]
    loss_N = optax.softmax_cross_entropy_with_integer_labels(logits_NC, y_N)
    loss = jnp.sum(weight_N * loss_N) / jnp.sum(weight_N)
    return loss + penalty / 2 * jnp.sum(jnp.square(model['weight']))

  optimizer = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry):
    model, state, _ = carry
    value, gradient = value_and_grad(model, state=state)
    updates, state = optimizer.update(
      gradient, state, model, value=value, grad=gradient, value_fn=objective
    )
    return optax.apply_updates(model, updates), state, gradient

  def going(carry):
    _, state, gradient = carry
    count = optax.tree.get(state, 'count')
    steepest = optax.tree.max(jax.tree.map(jnp.abs, gradient))
    return (count < _MAX_ITERATIONS) & (steepest > _GRADIENT_TOLERANCE)

  unknown = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), model)
  carry = (model, optimizer.init(model), unknown)
  return jax.lax.while_loop(going, step, carry)[0]
