"""Logistic regression to convergence, as scikit-learn's LogisticRegression.

Minimises the summed loss plus penalty / 2 times the squared weights, the bias
free; the penalty is 1 / C of scikit-learn. All sums are divided by the number
of rows, which changes no minimum.

The features are centered and turned to their principal axes, which changes
neither the minimum nor the penalty, and makes the Hessian's diagonal a good
stand-in for the Hessian. Where axes are few its blocks, one an output, cost
little more and take a tenth of the iterations. Axis 0 is the bias: ones,
without a penalty.

Shapes: N rows, D features, A axes, C outputs; K tiles of T rows; X is C or 1.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import numpy as np

from mlcd_jax import sharding
from mlcd_jax.evaluate import newton

MAX_ITERATIONS = 10_000
# Of the objective: the decrease that is left when the last step is taken. What
# is left after it is a tenth of that or less.
TOLERANCE = 1e-7
# Of the largest variance: below it is the rounding of float64, as along the
# axes that grey images leave empty.
_NO_VARIANCE = 1e-24
_AXES_STEP = 64  # Axes are padded to a multiple, to share compiled code.
_MAX_BLOCK = 128  # Axes; a block costs a third as many passes over the rows.
_HOST_ROWS = 8_192  # In float64 at a time.

_TILES = PartitionSpec(None, sharding.AXES)
# Features (64 MiB) below which sums over devices cost more than they save.
_MIN_SPLIT = 2**24
# Of a tile's logits, over all devices. Small ones stay in a CPU's cache.
_CPU_LOGITS, _ACCELERATOR_LOGITS = 2**18, 2**26

# The bias of a class that no row has; its minimum is at minus infinity.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Rows:
  """Features on the devices, ready to be fitted.

  Attributes:
    x_KTA: float32, ones and then principal axes; split over the mesh.
    basis_DA: float64, orthonormal; the rest of the features is zero on all
      rows.
    mean_D: float64, what was subtracted.
    num_rows: N without padding.
    num_outputs: C.
    mesh: of all devices.
  """

  x_KTA: jax.Array
  basis_DA: np.ndarray
  mean_D: np.ndarray
  num_rows: int
  num_outputs: int
  mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Model:
  """What was fitted.

  Attributes:
    weight_DC: float32, for features as they came.
    bias_C: float32.
    objective: at the minimum: mean loss, plus penalty / (2 rows) times the
      squared weights.
    iterations: passes over the rows.
    converged: False where MAX_ITERATIONS came first.
    along_AC: bias and weights along the axes, for `start`.
  """

  weight_DC: np.ndarray
  bias_C: np.ndarray
  objective: float
  iterations: int
  converged: bool
  along_AC: np.ndarray


def prepare(x_ND: np.ndarray, mesh: Mesh, *, num_outputs: int) -> Rows:
  """Puts features on the devices: split over all, or if few on one.

  Several processes then fit the same, each on a device of its own.
  """
  num_rows = len(x_ND)
  split = x_ND.size >= _MIN_SPLIT
  if not split:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  mean_D, basis_DA = _axes(x_ND)
  if split and jax.process_count() > 1:
    # Axes of equal variance are arbitrary: all rows need the same ones. Float64
    # travels as bytes.
    mean_D, basis_DA = (
      multihost_utils.broadcast_one_to_all(part.view(np.uint8)).view(np.float64)
      for part in (mean_D, basis_DA)
    )
  x_NA = _turn(x_ND, mean_D, basis_DA)
  variance_A = np.mean(np.square(x_NA), axis=0, dtype=np.float64)
  kept_A = variance_A > _NO_VARIANCE * variance_A.max()
  count, tile = _tile_shape(num_rows, num_outputs, mesh)
  x_KTA = np.zeros(
    (count * tile, -(-(1 + kept_A.sum()) // _AXES_STEP) * _AXES_STEP),
    np.float32,
  )
  x_KTA[:num_rows, 0] = 1
  x_KTA[:num_rows, 1 : 1 + kept_A.sum()] = x_NA[:, kept_A]
  return Rows(
    sharding.put(mesh, _TILES, x_KTA.reshape(count, tile, -1)),
    basis_DA[:, kept_A],
    mean_D,
    num_rows,
    num_outputs,
    mesh,
  )


def _axes(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean and the principal axes, as many as there are rows or features.

  In float64 on the host: features of very different scales need it, and it
  takes less time than one fit.
  """
  num_rows, dim = x_ND.shape
  mean_D = x_ND.mean(axis=0, dtype=np.float64)
  if num_rows < dim:
    basis_DA = np.linalg.svd(x_ND - mean_D[None], full_matrices=False)[2].T
    return mean_D, np.ascontiguousarray(basis_DA)
  sums_DD = np.zeros((dim, dim))
  for begin in range(0, num_rows, _HOST_ROWS):
    part_ND = x_ND[begin : begin + _HOST_ROWS] - mean_D[None]
    sums_DD += part_ND.T @ part_ND
  return mean_D, np.ascontiguousarray(np.linalg.eigh(sums_DD)[1])


def _turn(x_ND, mean_D, basis_DA):
  x_NA = np.empty((len(x_ND), basis_DA.shape[1]), np.float32)
  for begin in range(0, len(x_ND), _HOST_ROWS):
    rows = slice(begin, begin + _HOST_ROWS)
    x_NA[rows] = (x_ND[rows] - mean_D[None]) @ basis_DA
  return x_NA


def _tile_shape(num_rows, num_outputs, mesh):
  """Cuts the rows so that a tile's logits stay small."""
  limit = _CPU_LOGITS if sharding.on_cpu(mesh) else _ACCELERATOR_LOGITS
  count = max(1, round(num_rows / max(limit // num_outputs, 256)))
  tile = -(-num_rows // (count * mesh.size)) * mesh.size
  return count, tile


def fit(
  rows: Rows,
  y: np.ndarray,
  weight_N: np.ndarray,
  penalty: float,
  *,
  loss: str = 'softmax',
  start: Model | None = None,
  tolerance: float = TOLERANCE,
  max_iterations: int = MAX_ITERATIONS,
) -> Model:
  """Fits a model.

  Args:
    rows: of `prepare`.
    y: int [N] classes for loss='softmax', 0 or 1 [N, C] for 'sigmoid'; what is
      below 0 is left out: the row, or with 'sigmoid' that output of it.
    weight_N: of every row; 0 leaves it out without a change of shape.
    penalty: see the top of the file.
    loss: softmax: one class a row; sigmoid: outputs apart, losses added up.
    start: a model of the same rows and another penalty or weight; it saves
      iterations.
    tolerance: of the objective; see TOLERANCE.
    max_iterations: passes over the rows at which to stop all the same.
  """
  weight_NX = np.asarray(weight_N, np.float32)[:, None]
  known_NX = np.reshape(y, (rows.num_rows, -1)) >= 0
  if not known_NX.all():
    weight_NX = weight_NX * known_NX
  start_AC, free_C, total = _start(rows, y, weight_NX, loss)
  along_AC = start_AC if start is None else start.along_AC
  shape = rows.x_KTA.shape[:2]

  def tiles(x, dtype):
    x = np.asarray(x, dtype)
    missing = shape[0] * shape[1] - len(x)
    x = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return sharding.put(rows.mesh, _TILES, x.reshape(*shape, *x.shape[1:]))

  point, iterations, converged = _fit(
    rows.x_KTA,
    tiles(y, np.int32),
    tiles(weight_NX, np.float32),
    start_AC,
    along_AC,
    free_C,
    np.float32(penalty / total),
    np.float32(total),
    np.float32(tolerance),
    np.int32(max_iterations),
    loss=loss,
    mesh=rows.mesh,
  )
  along_AC = sharding.to_host(point.x_AC)
  weight_DC = rows.basis_DA @ along_AC[1 : 1 + rows.basis_DA.shape[1]]
  weight_DC = weight_DC.astype(np.float32)
  # Of the weights as they are rounded, which matters to features off center.
  bias_C = along_AC[0] - rows.mean_D @ weight_DC
  return Model(
    weight_DC,
    bias_C.astype(np.float32),
    float(sharding.to_host(point.value)),
    int(iterations),
    bool(converged),
    along_AC,
  )


def _start(rows, y, weight_NX, loss):
  """The model without features, which outputs to fit, and how many rows.

  Its biases are the classes' log probabilities or an output's log odds; those
  with no minimum, of a class that is always or never there, are not fitted.
  """
  num_outputs = rows.num_outputs
  if loss == 'softmax':
    total = weight_NX.sum(dtype=np.float64)
    there_C = np.bincount(np.maximum(y, 0), weight_NX[:, 0], num_outputs)
    other_C = np.full(num_outputs, total)
    free_C = there_C > 0
  else:
    weight_NC = np.broadcast_to(weight_NX, y.shape)
    total = weight_NC.sum(dtype=np.float64) / num_outputs
    there_C = np.sum(weight_NC * (y > 0), axis=0, dtype=np.float64)
    other_C = np.sum(weight_NC * (y <= 0), axis=0, dtype=np.float64)
    free_C = (there_C > 0) & (other_C > 0)
  with np.errstate(divide='ignore', invalid='ignore'):
    bias_C = np.nan_to_num(np.log(there_C) - np.log(other_C), nan=0)
  start_AC = np.zeros((rows.x_KTA.shape[2], num_outputs), np.float32)
  start_AC[0] = np.clip(bias_C, _NEVER, -_NEVER)
  return start_AC, free_C, total


def _softmax(z_TC, y_T, weight_T1):
  """The summed loss, and slopes and curvatures by the logits.

  What the target lacks to 1 is summed from the others, since it vanishes in
  float32 where features separate the classes.
  """
  z_TC = z_TC - jnp.max(z_TC, axis=1, keepdims=True)
  hot_TC = y_T[:, None] == jnp.arange(z_TC.shape[1])[None]
  target_T1 = jnp.sum(jnp.where(hot_TC, z_TC, 0), axis=1, keepdims=True)
  e_TC = jnp.exp(z_TC)
  sum_T1 = jnp.sum(e_TC, axis=1, keepdims=True)
  rest_T1 = jnp.sum(jnp.where(hot_TC, 0, e_TC), axis=1, keepdims=True)
  loss_T1 = jnp.where(
    target_T1 == 0, jnp.log1p(rest_T1), jnp.log(sum_T1) - target_T1
  )
  slope_TC = jnp.where(hot_TC, -rest_T1, e_TC) / sum_T1 * weight_T1
  p_TC = e_TC / sum_T1
  curvature_TC = jnp.where(hot_TC, -p_TC, 1 - p_TC) * slope_TC
  return jnp.sum(loss_T1 * weight_T1), slope_TC, curvature_TC


def _sigmoid(z_TC, y_TC, weight_TX):
  """As `_softmax`, of independent outputs."""
  sign_TC = jnp.where(y_TC > 0, -1.0, 1.0)
  wrong_TC = jax.nn.sigmoid(sign_TC * z_TC) * weight_TX
  loss = jnp.sum(jax.nn.softplus(sign_TC * z_TC) * weight_TX)
  right_TC = jax.nn.sigmoid(-sign_TC * z_TC)
  return loss, sign_TC * wrong_TC, wrong_TC * right_TC


_LOSSES = {'softmax': _softmax, 'sigmoid': _sigmoid}


@functools.partial(jax.jit, static_argnames=('loss', 'mesh'))
@jax.default_matmul_precision('highest')
def _fit(
  x_KTA, y, weight_KTX, start_AC, along_AC, free_C, penalty, total, tolerance,
  max_iterations, *, loss, mesh,
):  # fmt: skip
  of_tile = _LOSSES[loss]
  penalty_A1 = jnp.where(jnp.arange(x_KTA.shape[2])[:, None] == 0, 0, penalty)
  # Several CPU devices wait for ever in a Cholesky factorization in a loop.
  blocks = x_KTA.shape[2] <= _MAX_BLOCK and not (
    mesh.size > 1 and sharding.on_cpu(mesh)
  )

  def sums(of, *models):
    """Adds up what `of` makes of models and tiles, over the number of rows."""
    tiles = x_KTA, y, weight_KTX

    def local(models, tiles):
      shapes = jax.eval_shape(of, *models, *jax.tree.map(lambda x: x[0], tiles))
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

      def add(carry, tile):
        return jax.tree.map(jnp.add, carry, of(*models, *tile)), None

      # The devices meet once a pass. Left to the compiler they would at every
      # block, and could wait for each other at different ones.
      return lax.psum(lax.scan(add, zeros, tiles)[0], sharding.AXES)

    found = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(sharding.REPLICATED, _TILES),
      out_specs=sharding.REPLICATED,
      check_vma=False,
    )(models, tiles)
    return jax.tree.map(lambda x: x / total, found)

  def evaluate(w_AC):
    def of(w_AC, x_TA, y_T, weight_TX):
      loss, slope_TC, curvature_TC = of_tile(x_TA @ w_AC, y_T, weight_TX)
      hessian = _blocks if blocks else _diagonal
      return loss, x_TA.T @ slope_TC, hessian(x_TA, curvature_TC)

    value, slope_AC, hessian = sums(of, w_AC)
    return newton.Point(
      w_AC,
      value + jnp.sum(penalty_A1 * jnp.square(w_AC)) / 2,
      slope_AC + penalty_A1 * w_AC,
      hessian + (jnp.diag(penalty_A1[:, 0])[None] if blocks else penalty_A1),
    )

  def product(w_AC, v_AC):
    def of(w_AC, v_AC, x_TA, y_T, weight_TX):
      def slope(z_TC):
        return of_tile(z_TC, y_T, weight_TX)[1]

      return x_TA.T @ jax.jvp(slope, (x_TA @ w_AC,), (x_TA @ v_AC,))[1]

    return sums(of, w_AC, v_AC) + penalty_A1 * v_AC

  return newton.minimise(
    evaluate,
    product,
    _begin(start_AC, along_AC, free_C, loss),
    free_C,
    zero_sum=loss == 'softmax',
    tolerance=tolerance,
    max_passes=max_iterations,
  )


def _diagonal(x_TA, curvature_TC):
  return jnp.square(x_TA).T @ curvature_TC


def _blocks(x_TA, curvature_TC):
  def block(curvature_T):
    return (x_TA * curvature_T[:, None]).T @ x_TA

  return lax.map(block, curvature_TC.T)


def _begin(start_AC, along_AC, free_C, loss):
  """Where another fit ended, but for classes that it or this one lacks."""
  known_C = free_C & (jnp.abs(along_AC[0]) < -_NEVER)
  weight_AC = jnp.where(known_C[None], along_AC, 0)
  if loss == 'softmax':
    mean_A1 = jnp.mean(weight_AC, axis=1, keepdims=True, where=free_C[None])
    weight_AC = jnp.where(free_C[None], weight_AC - mean_A1, 0)
  bias_C = jnp.where(known_C, along_AC[0], start_AC[0])
  return weight_AC.at[0].set(bias_C)
