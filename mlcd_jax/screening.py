"""Scores on leading dimensions, and the width at which they are good enough.

The leading dimensions are those of the centers: what separates centers is what
a score must see. They must not be those of the sample that is looked at, which
would be served better than other points. Shapes: K centers, D dimensions, P
leading dimensions, T points a tile, S sampled points, B buckets of centers.
"""

import functools
import logging

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import sharding

_log = logging.getLogger(__name__)

# Widths to choose from.
_WIDTHS = (128, 160, 192, 256, 384)

# What a width may cost the mean cosine of a sample when it is chosen, and as a
# share of the objective before a wider one is taken. More may be lost in the
# first pass, whose labels only make better centers of random rows.
MAX_LOSS = 5e-5
MAX_FIRST_LOSS = 1e-3
MAX_CHECKED_LOSS = 1e-4

# Sampled rows: all of them; to choose a width by before the first pass and
# later; to check a pass by.
_SAMPLE_ROWS = 2_048
FIRST_ROWS = 512
LATER_ROWS = 1_024
_CHECKED_ROWS = 512

# Below these a pass is too short for screening to gain.
_MIN_CENTERS = 512
_MIN_DIM = 2 * _WIDTHS[0]

# A candidate is the best of a bucket of centers: by this many buckets, among
# all centers, fewer where those are few, and among those that moved.
NUM_BUCKETS = 64
NUM_MOVED = 2

# Centers of a tile.
_TILE_CENTERS = 4_096

# Centers whose leading dimensions are taken, and spare directions that make
# those more exact.
_BASIS_ROWS = 4_096
_SPARE = 32


def pays(num_rows: int, dim: int, num_centers: int) -> bool:
  """Whether a clustering is large enough to be screened."""
  return (
    num_rows >= _SAMPLE_ROWS and num_centers >= _MIN_CENTERS and dim >= _MIN_DIM
  )


def num_candidates(num_centers: int) -> int:
  """Candidates of a point among all centers."""
  return 4 if num_centers < 2_048 else 8


def tile_rows(num_centers: int) -> int:
  """Points of a tile: 2 MB of scores stay in the cache."""
  rows = min(256, 2**19 // min(num_centers, _TILE_CENTERS))
  return 1 << (rows.bit_length() - 1)


def _next_width(width: int, dim: int) -> int:
  """The next one, or 0 for all dimensions where it would not pay."""
  return next((w for w in _WIDTHS if width < w <= dim // 2), 0)


class Sample:
  """Rows by which the width is chosen and checked.

  Attributes:
    rows: their numbers, ascending, at equal distances.
    mean: float32 [D], about theirs.
  """

  def __init__(
    self,
    embeddings: points.Rows,
    mesh: Mesh,
    num_centers: int,
    score_dtype: jnp.dtype,
  ):
    """Reads a sample of the rows [N, D]."""
    count = min(_SAMPLE_ROWS, embeddings.shape[0])
    self.rows = np.linspace(0, embeddings.shape[0] - 1, count).astype(int)
    self._values = points.unit_rows_at(embeddings, self.rows)
    # Rounded, so that it does not depend on the order of a sum.
    usable = max(1, self._values.any(axis=1).sum())
    self.mean = np.round(self._values.sum(axis=0) / usable, 3)
    self._num_centers = num_centers
    self._prepare = functools.partial(
      make_prepare, mesh, num_centers, score_dtype=score_dtype
    )

  def choose(
    self,
    c_KD: jax.Array,
    labels_S: np.ndarray,
    *,
    rows: int,
    wider_than: int,
    max_loss: float,
  ) -> tuple[int, np.ndarray]:
    """The smallest width that is good enough, and its dimensions.

    Args:
      c_KD: centers, padded.
      labels_S: of the sample in the pass before.
      rows: of the sample that are looked at.
      wider_than: a width that was not good enough.
      max_loss: that the mean cosine may lose.

    Returns:
      The width, 0 if all dimensions are needed; float32 [D, P], P the width.
    """
    few = slice(None, None, -(-len(self.rows) // rows))
    values, labels = self._values[few], labels_S[few]
    whole = self._whole(c_KD)
    best_S = _best_cosines(*whole, values, labels)
    basis = np.zeros((len(self.mean), 0), np.float32)
    width = _next_width(wider_than, len(self.mean))
    while width:
      if basis.shape[1] < width:
        most = 192 if width <= 192 else _WIDTHS[-1]
        basis = np.asarray(
          _leading(whole[0], self.mean, most, self._num_centers)
        )
      leading = basis[:, :width]
      _, cs_KP = self._prepare(width)(c_KD, self.mean, leading)
      found_S = _screened_cosines(whole[0], cs_KP, values, leading, labels)
      loss = float(jnp.mean(jnp.maximum(best_S - found_S, 0)))
      _log.info('screening: %d dimensions would cost %.1e', width, loss)
      if loss < max_loss:
        return width, leading
      width = _next_width(width, len(self.mean))
    return 0, basis[:, :0]

  def loss(
    self, c_KD: jax.Array, labels_S: np.ndarray, iteration: int
  ) -> tuple[float, float]:
    """Mean cosine that labels lack to the best center's, and the latter.

    Every iteration looks at other rows of the sample.
    """
    step = -(-len(self.rows) // _CHECKED_ROWS)
    few = slice(iteration % step, None, step)
    values, labels = self._values[few], labels_S[few]
    whole = self._whole(c_KD)
    best_S = _best_cosines(*whole, values, labels)
    own_S = _own_cosines(whole[0], values, labels)
    return float(jnp.mean(best_S - own_S)), float(jnp.mean(best_S))

  def _whole(self, c_KD):
    """All centers, and without the mean as they are scored."""
    return self._prepare(0)(c_KD, self.mean, self.mean[:, None])


@functools.cache
def make_prepare(
  mesh: Mesh, num_centers: int, width: int, score_dtype: jnp.dtype
):
  """Makes: centers, mean, dimensions -> all centers, and what is scored.

  Both are on every device, the first in float32 with copies of the first
  center in the place of padding, the second without the mean and on the
  leading dimensions if there is a width.
  """

  def prepare(c_kD, mean_D, basis_DP):
    c_kD = nearest.real_centers(c_kD, num_centers)
    c_KD = lax.all_gather(c_kD, 'fsdp', tiled=True)
    cs_KP = c_KD - mean_D[None]
    if width:
      cs_KP = cs_KP @ basis_DP
    return c_KD, cs_KP.astype(score_dtype)

  return jax.jit(
    jax.shard_map(
      prepare,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.REPLICATED, sharding.REPLICATED),
      out_specs=(sharding.REPLICATED, sharding.REPLICATED),
      check_vma=False,
    )
  )


@functools.cache
def make_project(mesh: Mesh, score_dtype: jnp.dtype):
  """Makes: points [n, D], dimensions -> [n, P]."""
  return jax.jit(
    jax.shard_map(
      lambda x_nD, basis_DP: (x_nD @ basis_DP).astype(score_dtype),
      mesh=mesh,
      in_specs=(sharding.POINTS, sharding.REPLICATED),
      out_specs=sharding.POINTS,
    )
  )


def candidates(cs_KP: jax.Array, xs_TP: jax.Array, count: int) -> list:
  """Numbers [T] of `count` centers, each the best of its bucket."""
  num_rows = len(cs_KP) // NUM_BUCKETS
  # The row rides in the score's low bits, which mean less than the dimensions
  # that are left out: one maximum finds both.
  mask = (1 << (num_rows - 1).bit_length()) - 1

  def best(first_row, c_tP):
    s_RBT = nearest.products(c_tP, xs_TP).reshape(-1, NUM_BUCKETS, len(xs_TP))
    row_RBT = first_row + lax.broadcasted_iota(jnp.int32, s_RBT.shape, 0)
    key_RBT = lax.bitcast_convert_type(s_RBT, jnp.int32) & ~mask | row_RBT
    return jnp.max(lax.bitcast_convert_type(key_RBT, jnp.float32), axis=0)

  tile = NUM_BUCKETS * nearest.divisor(num_rows, _TILE_CENTERS // NUM_BUCKETS)
  if tile == len(cs_KP):
    key_BT = best(0, cs_KP)
  else:
    key_BT, _ = lax.scan(
      lambda key_BT, part: (jnp.maximum(key_BT, best(*part)), None),
      jnp.full((NUM_BUCKETS, len(xs_TP)), -jnp.inf, jnp.float32),
      (
        jnp.arange(0, num_rows, tile // NUM_BUCKETS, dtype=jnp.int32),
        cs_KP.reshape(-1, tile, cs_KP.shape[1]),
      ),
    )
  found = []
  for _ in range(count):
    key_T, bucket_T = nearest.first_max(key_BT)
    row_T = lax.bitcast_convert_type(key_T, jnp.int32) & mask
    found.append(row_T * NUM_BUCKETS + bucket_T)
    bucket_BT = lax.broadcasted_iota(jnp.int32, key_BT.shape, 0)
    key_BT = jnp.where(bucket_BT == bucket_T[None], -jnp.inf, key_BT)
  return found


def cosines(x_TD: jax.Array, c_KD: jax.Array, ids_TM: jax.Array) -> jax.Array:
  """Float32 cosines [T, M] to the centers of these numbers."""
  # Fused into the products, the gather is twice as slow.
  c_TMD = lax.optimization_barrier(
    c_KD.at[ids_TM.reshape(-1)].get(mode='promise_in_bounds')
  ).reshape(*ids_TM.shape, -1)
  return jnp.einsum(
    'td,tmd->tm', x_TD, c_TMD, preferred_element_type=jnp.float32
  )


def rescore(
  x_TD: jax.Array, c_KD: jax.Array, candidates_: list
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Best cosine and its center, float32, and the first candidate's cosine."""
  ids_TM = jnp.stack(candidates_, axis=1)
  s_TM = cosines(x_TD, c_KD, ids_TM)
  best_T, place_T = nearest.first_max(s_TM.T)
  ids_T = jnp.take_along_axis(ids_TM, place_T[:, None], axis=1)[:, 0]
  return best_T, ids_T, s_TM[:, 0]


@jax.jit
def _own_cosines(c_KD, x_SD, label_S):
  return jnp.sum(x_SD * c_KD[label_S], axis=1)


@jax.jit
def _best_cosines(c_KD, cs_KD, x_SD, label_S):
  """Of the center that is best in low precision, or the label if better."""
  tile = (256, len(cs_KD))
  _, best_S = nearest.best_center(cs_KD, x_SD.astype(cs_KD.dtype), tile=tile)
  return jnp.maximum(
    _own_cosines(c_KD, x_SD, best_S), _own_cosines(c_KD, x_SD, label_S)
  )


@jax.jit
def _screened_cosines(c_KD, cs_KP, x_SD, basis_DP, label_S):
  xs_SP = (x_SD @ basis_DP).astype(cs_KP.dtype)
  candidates_ = candidates(cs_KP, xs_SP, num_candidates(len(cs_KP)))
  return rescore(x_SD, c_KD, [label_S, *candidates_])[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leading(c_KD, mean_D, width, num_centers):
  """The leading directions [D, P] of some centers, the first ones first.

  Two steps of subspace iteration (Halko, Martinsson and Tropp 2011, Algorithm
  4.4), then the eigenvectors within the subspace.
  """
  rows = np.linspace(0, num_centers - 1, min(_BASIS_ROWS, num_centers))
  c_SD = c_KD[rows.astype(int)] - mean_D[None]
  moment_DD = c_SD.T @ c_SD
  y_DP = jax.random.normal(
    jax.random.key(0), (len(mean_D), min(width + _SPARE, len(mean_D)))
  )
  for _ in range(2):
    y_DP = moment_DD @ y_DP
    y_DP /= jnp.linalg.norm(y_DP, axis=0, keepdims=True)
  q_DP = jnp.linalg.qr(y_DP)[0]
  _, vectors = jnp.linalg.eigh(q_DP.T @ (moment_DD @ q_DP))
  return q_DP @ vectors[:, ::-1][:, :width]
