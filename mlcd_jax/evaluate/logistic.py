"""Logistic regression by L-BFGS, for several penalties at once.

Minimises the mean loss plus penalty / 2 times the squared weights, the bias
free: scikit-learn's LogisticRegression with C = 1 / (penalty * rows).

The features are centered and turned to their principal axes, which changes
neither the minimum nor the penalty, and the weight of each axis is scaled by
an estimate of the objective's curvature along it. On features as encoders make
them L-BFGS then takes about a tenth of the iterations.

Shapes: N rows, D features, A axes, C outputs, P penalties; T rows a tile.
"""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from mlcd_jax import nearest
from mlcd_jax import sharding

MAX_ITERATIONS = 1_000
# Of the largest gradient in the features' own coordinates; scikit-learn's, and
# so that of CLIP's probe.
TOLERANCE = 1e-4
# Of the largest variance: below it is rounding, as along the axes that grey
# images leave empty.
_NO_VARIANCE = 1e-11
_AXES_STEP = 64
_PATIENCE = 10  # Iterations in a row without progress.

_TILES = PartitionSpec(None, sharding.AXES)
# Features (64 MiB) below which sums over devices cost more than they save.
_MIN_SPLIT = 2**24
# Of a tile's logits, over all devices. Small ones stay in a CPU's cache.
_CPU_LOGITS, _ACCELERATOR_LOGITS = 2**20, 2**26


@dataclasses.dataclass(frozen=True)
class Rows:
  """Features on the devices, ready to be fitted.

  Attributes:
    x_NA: float32, centered, along the principal axes; split over the mesh.
    variance_A: of each axis.
    basis_DA: orthonormal; the rest of the features is zero on all rows.
    mean_D: what was subtracted.
    num_rows: N without padding.
    mesh: of all devices.
  """

  x_NA: jax.Array
  variance_A: jax.Array
  basis_DA: jax.Array
  mean_D: jax.Array
  num_rows: int
  mesh: Mesh


def prepare(x_ND: np.ndarray, mesh: Mesh) -> Rows:
  """Puts features on the devices: split over all, or if few on one.

  Several processes then fit the same, each on a device of its own.
  """
  num_rows, dim = x_ND.shape
  if x_ND.size < _MIN_SPLIT:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  missing = -num_rows % mesh.size
  padded = np.pad(np.asarray(x_ND, np.float32), ((0, missing), (0, 0)))
  by_rows = NamedSharding(mesh, PartitionSpec(sharding.AXES))
  x_ND = jax.make_array_from_callback(
    padded.shape, by_rows, lambda index: padded[index]
  )
  valid = (np.arange(len(padded)) < num_rows).astype(np.float32)
  valid = jax.make_array_from_callback(
    valid.shape, by_rows, lambda index: valid[index]
  )
  x_NA, variance_A, basis_DA, mean_D = _rotate(x_ND, valid, few=num_rows < dim)
  kept = _axes(nearest.to_host(variance_A))
  return Rows(
    x_NA[:, kept], variance_A[kept], basis_DA[:, kept], mean_D, num_rows, mesh
  )


def _axes(variance_A: np.ndarray) -> np.ndarray:
  """The axes along which rows differ, in steps of _AXES_STEP to share code."""
  there = np.sum(variance_A > _NO_VARIANCE * variance_A.max())
  count = -(-max(there, 1) // _AXES_STEP) * _AXES_STEP
  return np.sort(np.argsort(-variance_A)[:count])


@functools.partial(jax.jit, static_argnames='few')
@jax.default_matmul_precision('highest')
def _rotate(x_ND, valid_N, *, few):
  """Principal axes: all D, or as many as there are rows if those are fewer."""
  valid_N1 = valid_N[:, None]
  mean_D = jnp.sum(x_ND * valid_N1, axis=0) / jnp.sum(valid_N)
  x_ND = (x_ND - mean_D[None]) * valid_N1
  if few:
    basis_DA = jnp.linalg.svd(x_ND, full_matrices=False)[2].T
  else:
    basis_DA = jnp.linalg.eigh(x_ND.T @ x_ND)[1]
  x_NA = x_ND @ basis_DA
  variance_A = jnp.sum(jnp.square(x_NA), axis=0) / jnp.sum(valid_N)
  return x_NA, variance_A, basis_DA, mean_D


def fit(
  rows: Rows,
  y: np.ndarray,
  weight_N: np.ndarray,
  penalties_P: np.ndarray,
  *,
  num_outputs: int,
  loss: str = 'softmax',
  tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
  """Fits one model a penalty.

  Args:
    rows: of `prepare`.
    y: int [N] classes for loss='softmax', 0 or 1 [N, C] for 'sigmoid', or -1
      where neither is known.
    weight_N: of every row; 0 leaves it out without a change of shape.
    penalties_P: see the top of the file.
    num_outputs: C.
    loss: softmax: one class a row; sigmoid: outputs apart, losses added up.
    tolerance: largest absolute value of the gradient at which to stop.

  Returns:
    weights float32 [P, D, C] and biases [P, C], for features as they came.
  """
  x_KTA, y, weight_KT = _tiles(
    rows, y, weight_N, len(penalties_P) * num_outputs
  )
  weight_PDC, bias_PC = _fit(
    x_KTA,
    y,
    weight_KT,
    rows.variance_A,
    rows.basis_DA,
    rows.mean_D,
    jnp.asarray(penalties_P, jnp.float32),
    jnp.float32(tolerance),
    num_outputs=num_outputs,
    loss=loss,
  )
  return nearest.to_host(weight_PDC), nearest.to_host(bias_PC)


def _tiles(rows, y, weight_N, columns):
  """Cuts the rows so that a tile's logits stay small."""
  mesh = rows.mesh
  cpu = mesh.devices.flat[0].platform == 'cpu'
  wanted = (_CPU_LOGITS if cpu else _ACCELERATOR_LOGITS) // columns
  padded = len(rows.x_NA)
  count = max(1, round(padded / max(wanted, 256)))
  tile = -(-padded // (count * mesh.size)) * mesh.size

  def pad(x, dtype):
    x = np.asarray(x, dtype)
    return np.pad(x, [(0, padded - len(x))] + [(0, 0)] * (x.ndim - 1))

  return _cut(
    (rows.x_NA, pad(y, np.int32), pad(weight_N, np.float32)),
    count=count,
    tile=tile,
    sharding=NamedSharding(mesh, _TILES),
  )


@functools.partial(jax.jit, static_argnames=('count', 'tile', 'sharding'))
def _cut(arrays, *, count, tile, sharding):
  def cut(x):
    padding = [(0, count * tile - len(x))] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, padding).reshape(count, tile, *x.shape[1:])
    return lax.with_sharding_constraint(x, sharding)

  return tuple(map(cut, arrays))


def _softmax(z_TC, y_T):
  """Losses [T] and their gradients by the logits.

  What the target lacks to 1 is summed from the others, since it vanishes in
  float32 where features separate the classes.
  """
  z_TC = z_TC - jnp.max(z_TC, axis=1, keepdims=True)
  hot_TC = y_T[:, None] == jnp.arange(z_TC.shape[1])[None]
  target_T = jnp.sum(jnp.where(hot_TC, z_TC, 0), axis=1)
  e_TC = jnp.exp(z_TC)
  sum_T = jnp.sum(e_TC, axis=1)
  rest_T = jnp.sum(jnp.where(hot_TC, 0, e_TC), axis=1)
  loss_T = jnp.where(
    target_T == 0, jnp.log1p(rest_T), jnp.log(sum_T) - target_T
  )
  slope_TC = jnp.where(hot_TC, -rest_T[:, None], e_TC) / sum_T[:, None]
  return loss_T, slope_TC


def _sigmoid(z_TC, y_TC):
  """As `_softmax`, of independent outputs; those of a -1 are left out."""
  known_TC = y_TC >= 0
  loss_TC = jax.nn.softplus(z_TC) - y_TC * z_TC
  loss_T = jnp.sum(jnp.where(known_TC, loss_TC, 0), axis=1)
  return loss_T, jnp.where(known_TC, jax.nn.sigmoid(z_TC) - y_TC, 0)


_LOSSES = {'softmax': _softmax, 'sigmoid': _sigmoid}


@functools.partial(jax.jit, static_argnames=('num_outputs', 'loss'))
@jax.default_matmul_precision('highest')
def _fit(
  x_KTA, y, weight_KT, variance_A, basis_DA, mean_D, penalties_P, tolerance,
  *, num_outputs, loss,
):  # fmt: skip
  # Of p (1 - p): at the start of a softmax, and well inside a sigmoid.
  curvature = 1 / num_outputs if loss == 'softmax' else 0.1

  def one(penalty):
    scale_A1 = lax.rsqrt(curvature * variance_A + penalty)[:, None]
    objective = _objective(
      x_KTA, y, weight_KT, penalty, scale_A1, curvature**-0.5, _LOSSES[loss]
    )

    def gradient_size(gradient):
      weight_DC = basis_DA @ (gradient['weight'] / scale_A1)
      bias_C = gradient['bias'] * curvature**0.5
      return jnp.maximum(jnp.max(jnp.abs(weight_DC)), jnp.max(jnp.abs(bias_C)))

    start = {
      'weight': jnp.zeros((x_KTA.shape[2], num_outputs)),
      'bias': jnp.zeros(num_outputs),
    }
    model = _minimise(objective, start, gradient_size, tolerance)
    weight_DC = basis_DA @ (model['weight'] * scale_A1)
    return weight_DC, model['bias'] * curvature**-0.5 - mean_D @ weight_DC

  return jax.vmap(one)(penalties_P)


def _objective(x_KTA, y, weight_KT, penalty, scale_A1, bias_scale, loss):
  """Makes model -> objective; its gradient comes with it in the same pass."""
  total = jnp.sum(weight_KT)

  def value_and_gradient(model):
    weight_AC = model['weight'] * scale_A1
    bias_C = model['bias'] * bias_scale

    def add(carry, tile):
      x_TA, y_T, weight_T = tile
      loss_T, slope_TC = loss(x_TA @ weight_AC + bias_C[None], y_T)
      slope_TC = slope_TC * weight_T[:, None]
      parts = jnp.sum(loss_T * weight_T), x_TA.T @ slope_TC, slope_TC.sum(0)
      return jax.tree.map(jnp.add, carry, parts), None

    zeros = jnp.zeros(()), jnp.zeros_like(weight_AC), jnp.zeros_like(bias_C)
    sums = lax.scan(add, zeros, (x_KTA, y, weight_KT))[0]
    value, slope_AC, slope_C = jax.tree.map(lambda x: x / total, sums)
    value += penalty / 2 * jnp.sum(jnp.square(weight_AC))
    return value, {
      'weight': (slope_AC + penalty * weight_AC) * scale_A1,
      'bias': slope_C * bias_scale,
    }

  @jax.custom_vjp
  def objective(model):
    return value_and_gradient(model)[0]

  objective.defvjp(
    value_and_gradient,
    lambda gradient, g: (jax.tree.map(lambda x: x * g, gradient),),
  )
  return objective


def _minimise(objective, model, gradient_size, tolerance):
  """L-BFGS until gradient or progress vanish, or the iterations run out."""
  optimizer = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry):
    model, state, _, stuck = carry
    value, gradient = value_and_grad(model, state=state)
    updates, state = optimizer.update(
      gradient, state, model, value=value, grad=gradient, value_fn=objective
    )
    new = optax.tree.get(state, 'value')
    # What float32 cannot tell from no progress.
    still = value - new <= jnp.finfo(jnp.float32).eps * jnp.abs(new)
    size = gradient_size(optax.tree.get(state, 'grad'))
    stuck = jnp.where(still, stuck + 1, 0)
    return optax.apply_updates(model, updates), state, size, stuck

  def going(carry):
    _, state, size, stuck = carry
    count = optax.tree.get(state, 'count')
    return (count < MAX_ITERATIONS) & (size > tolerance) & (stuck < _PATIENCE)

  carry = model, optimizer.init(model), jnp.float32(jnp.inf), jnp.int32(0)
  return lax.while_loop(going, step, carry)[0]
