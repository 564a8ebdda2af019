"""Logistic regression to convergence, as scikit-learn's LogisticRegression.

It minimises the sum of the rows' losses plus penalty / 2 times the sum of the
squared weights without the bias. The penalty is 1 / C of scikit-learn. The code
divides all sums by the number of rows, which does not move the minimum.

The features are centered and rotated to their principal axes. This does not
change the fitted model, but the Hessian's diagonal becomes a good approximation
of it. If there are few axes, its diagonal blocks, one for each output, cost
little more and take a tenth of the iterations. Axis 0 is the bias: 1 on all
rows, without a penalty.

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
# The last Newton step is the one that is expected to lower the objective by
# less than this share of it. A tenth of that or less then remains.
TOLERANCE = 1e-7
# Axes with less than this share of the largest variance hold only rounding
# errors of float64. Grey images leave such axes.
_NO_VARIANCE = 1e-24
_AXES_STEP = 64  # Axes are padded to a multiple, to share compiled code.
_MAX_BLOCK = 128  # Axes; blocks of A axes cost A / 3 passes over the rows.
_HOST_ROWS = 8_192  # Rows that the host converts to float64 at a time.

_TILES = PartitionSpec(None, sharding.AXES)  # [K, T, ...].
# Below this number of values (64 MiB), sums over devices cost more than they
# save.
_MIN_SPLIT = 2**24
# Logits of a tile, over all devices; on a CPU 1 MiB stays in the cache.
_CPU_LOGITS, _ACCELERATOR_LOGITS = 2**18, 2**26

# The bias of a class without a row; the optimum is minus infinity.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Rows:
  """Features on the devices, ready for fits.

  Attributes:
    x_KTA: float32, the rows along the axes, split over the mesh. Ones come
      first, then the principal axes, then zeros as padding.
    basis_DA: float64, the orthonormal principal axes, which span the centered
      features.
    mean_D: float64, the mean that was subtracted from the features.
    num_rows: N, without padding.
    num_outputs: C.
    mesh: the mesh of the devices that share the rows.
  """

  x_KTA: jax.Array
  basis_DA: np.ndarray
  mean_D: np.ndarray
  num_rows: int
  num_outputs: int
  mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Model:
  """A fitted model.

  Attributes:
    weight_DC: float32, the weights for the original features.
    bias_C: float32.
    objective: the value at the minimum: the mean loss, plus penalty / (2 N)
      times the sum of the squared weights.
    iterations: the number of passes over the rows.
    converged: False if the fit stopped at the maximum of passes.
    along_AC: the bias and the weights along the axes; `fit` can start from it.
  """

  weight_DC: np.ndarray
  bias_C: np.ndarray
  objective: float
  iterations: int
  converged: bool
  along_AC: np.ndarray


def prepare(x_ND: np.ndarray, mesh: Mesh, *, num_outputs: int) -> Rows:
  """Puts features, the same in all processes, on the devices.

  Many features are split over all devices. Few features go to one device; with
  several processes, each process then makes the same fits on its own device.
  """
  num_rows = len(x_ND)
  split = x_ND.size >= _MIN_SPLIT
  if not split:
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  mean_D, basis_DA = _axes(x_ND)
  if split and jax.process_count() > 1:
    # Axes of equal variance are arbitrary, and hosts may find different ones.
    # They are sent as bytes, since JAX would round float64 to float32.
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
  """Returns the mean [D] and the principal axes [D, A], with A = min(N, D).

  It runs in float64 on the host, which features of very different scales need.
  It takes less time than one fit.
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
  """Returns the centered rows along the axes, float32 [N, A]."""
  x_NA = np.empty((len(x_ND), basis_DA.shape[1]), np.float32)
  for begin in range(0, len(x_ND), _HOST_ROWS):
    rows = slice(begin, begin + _HOST_ROWS)
    x_NA[rows] = (x_ND[rows] - mean_D[None]) @ basis_DA
  return x_NA


def _tile_shape(num_rows, num_outputs, mesh):
  """Returns the number of tiles and the rows of a tile, over all devices."""
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
    rows: the features, from `prepare`.
    y: int. For 'softmax' the classes [N]; for 'sigmoid' 0 or 1, [N, C].
      Negative entries are left out.
    weight_N: the weight of every row. 0 leaves out the row but keeps the
      shapes, so that nothing is compiled again.
    penalty: the factor of the squared weights; see the top of the file.
    loss: 'softmax' for one class per row, 'sigmoid' for independent outputs
      whose losses are added.
    start: a fit of the same rows to begin at; it saves iterations.
    tolerance: the relative tolerance of the objective; see TOLERANCE.
    max_iterations: the passes after which the fit stops, converged or not.
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
  # From the rounded weights: if the mean is large, the bias must make up for
  # what their rounding changes.
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
  """Returns the best model without features, the outputs to fit, and the rows.

  The model [A, C] has only biases: the log probabilities of the classes, or the
  log odds of the outputs. The outputs to fit, bool [C], exclude a class without
  a row and a constant output, which have no finite optimum. The number of rows
  is weighted.
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
  """Returns a tile's summed loss and its two derivatives [T, C] by the logits.

  The first derivative at the target is p - 1. It is computed from the other
  probabilities, since 1 - p rounds to zero in float32 once features separate
  the classes.
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
  """Returns what `_softmax` returns, for independent outputs."""
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
  """Returns the last newton.Point, the passes, and whether they converged."""
  of_tile = _LOSSES[loss]
  penalty_A1 = jnp.where(jnp.arange(x_KTA.shape[2])[:, None] == 0, 0, penalty)
  # With several CPU devices, a Cholesky factorization in a loop deadlocks.
  blocks = x_KTA.shape[2] <= _MAX_BLOCK and not (
    mesh.size > 1 and sharding.on_cpu(mesh)
  )

  def sums(of, *models):
    """Sums of(*models, *tile) over all tiles and divides by the rows."""
    tiles = x_KTA, y, weight_KTX

    def local(models, tiles):
      shapes = jax.eval_shape(of, *models, *jax.tree.map(lambda x: x[0], tiles))
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

      def add(carry, tile):
        return jax.tree.map(jnp.add, carry, of(*models, *tile)), None

      # One collective per pass. The compiler would place one in every iteration
      # of the inner loops, and devices could wait for different ones.
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
  """Returns a tile's part of the diagonal [A, C] of the Hessian."""
  return jnp.square(x_TA).T @ curvature_TC


def _blocks(x_TA, curvature_TC):
  """Returns a tile's part of the diagonal blocks [C, A, A] of the Hessian."""

  def block(curvature_T):
    return (x_TA * curvature_T[:, None]).T @ x_TA

  return lax.map(block, curvature_TC.T)


def _begin(start_AC, along_AC, free_C, loss):
  """Returns the point to begin at: the end `along_AC` of an earlier fit.

  Outputs that either of the fits leaves out begin with the bias of `start_AC`.
  """
  known_C = free_C & (jnp.abs(along_AC[0]) < -_NEVER)
  weight_AC = jnp.where(known_C[None], along_AC, 0)
  if loss == 'softmax':
    mean_A1 = jnp.mean(weight_AC, axis=1, keepdims=True, where=free_C[None])
    weight_AC = jnp.where(free_C[None], weight_AC - mean_A1, 0)
  bias_C = jnp.where(known_C, along_AC[0], start_AC[0])
  return weight_AC.at[0].set(bias_C)
