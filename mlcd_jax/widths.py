"""Scores on leading dimensions, and the width at which they are good enough.

The leading dimensions are those of the centers: what separates centers is what
a score must see. They must not be those of the sample that is looked at, which
would be served better than other points. Shapes: K centers, D dimensions, P
leading dimensions, S sampled points.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from mlcd_jax import candidates
from mlcd_jax import nearest
from mlcd_jax import points

_log = logging.getLogger(__name__)

# Widths to choose from.
_WIDTHS = (96, 128, 160, 192, 256, 384)

# What a width may cost the mean cosine of a sample when it is chosen, and
# candidates as a share of it before they are sought anew. The first is as good
# as nothing: what the first passes lose is not made up for by later ones.
MAX_LOSS = 1e-5
MAX_CANDIDATES_LOSS = 1e-4

# Sampled rows: all of them; to choose a width by; to check a pass by.
_SAMPLE_ROWS = 2_048
_CHOICE_ROWS = 1_024
_CHECKED_ROWS = 512

# Below these a pass is too short for screening to gain; above this candidates
# would take more than 2 GiB.
_MIN_CENTERS = 512
_MIN_DIM = 256
_MAX_ROWS = 2**31 // (4 * candidates.COUNT)

# Centers whose leading dimensions are taken, and spare directions that make
# those more exact.
_BASIS_ROWS = 4_096
_SPARE = 32


def pay(num_rows: int, dim: int, num_centers: int) -> bool:
  """Whether a clustering is large enough to be screened."""
  return (
    _SAMPLE_ROWS <= num_rows <= _MAX_ROWS
    and num_centers >= _MIN_CENTERS
    and dim >= _MIN_DIM
  )


def _following(width: int, dim: int) -> int:
  """The next one, or 0 for all dimensions where it would not pay."""
  return next((w for w in _WIDTHS if width < w <= dim // 2), 0)


class Sample:
  """Rows by which the width is chosen and checked.

  Attributes:
    rows: their numbers, ascending, at equal distances.
    mean: float32 [D], about theirs.
    num_centers: K.
  """

  def __init__(
    self,
    embeddings: points.Rows,
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
    self.num_centers = num_centers
    self._score_dtype = score_dtype

  def choose(
    self, c_KD: jax.Array, labels_S: np.ndarray
  ) -> tuple[int, np.ndarray]:
    """The smallest width that is good enough, and its dimensions.

    Args:
      c_KD: whole centers.
      labels_S: of the sample in the pass before.

    Returns:
      The width, 0 if all dimensions are needed; float32 [D, P], P the width.
    """
    few = slice(None, None, -(-len(self.rows) // _CHOICE_ROWS))
    values, labels = self._values[few], labels_S[few]
    best_S = self._best_cosines(c_KD, values, labels)
    basis = np.zeros((len(self.mean), 0), np.float32)
    width = _following(0, len(self.mean))
    while width:
      if basis.shape[1] < width:
        most = 192 if width <= 192 else _WIDTHS[-1]
        basis = np.asarray(_leading(c_KD, self.mean, most, self.num_centers))
      leading = basis[:, :width]
      found_S = _screened_cosines(
        c_KD,
        self.scored(c_KD, leading),
        values,
        leading,
        labels,
        self.num_centers,
      )
      loss = float(jnp.mean(jnp.maximum(best_S - found_S, 0)))
      _log.info('screening: %d dimensions would cost %.1e', width, loss)
      if loss < MAX_LOSS:
        return width, leading
      width = _following(width, len(self.mean))
    return 0, basis[:, :0]

  def loss(
    self,
    c_KD: jax.Array,
    labels_S: np.ndarray,
    ids_SC: np.ndarray,
    iteration: int,
  ) -> float:
    """The share of the mean cosine that is lost if only candidates are seen.

    Every iteration looks at other rows of the sample.

    Args:
      c_KD: whole centers.
      labels_S: of the sample in the pass before.
      ids_SC: candidates of the sample.
      iteration: chooses the rows.
    """
    step = -(-len(self.rows) // _CHECKED_ROWS)
    few = slice(iteration % step, None, step)
    values, labels = self._values[few], labels_S[few]
    best_S = self._best_cosines(c_KD, values, labels)
    found_S = _candidates_cosines(c_KD, values, labels, ids_SC[few])
    lost_S = jnp.maximum(best_S - found_S, 0)
    return float(jnp.sum(lost_S) / jnp.sum(best_S))

  def scored(self, c_KD: jax.Array, basis: np.ndarray | None) -> jax.Array:
    """What is scored of whole centers: [K, P], or [K, D] without a basis."""
    return _scored(c_KD, self.mean, basis, self._score_dtype)

  def _best_cosines(self, c_KD, values, labels):
    """Of the center that is best in low precision, or the label if better."""
    return _best_cosines(c_KD, self.scored(c_KD, None), values, labels)


@functools.partial(jax.jit, static_argnames='dtype')
def _scored(c_KD, mean_D, basis_DP, dtype):
  cs_KP = c_KD - mean_D[None]
  if basis_DP is not None:
    cs_KP = cs_KP @ basis_DP
  return cs_KP.astype(dtype)


@jax.jit
def _best_cosines(c_KD, cs_KD, x_SD, label_S):
  tile = (256, len(cs_KD))
  _, best_S = nearest.best_center(cs_KD, x_SD.astype(cs_KD.dtype), tile=tile)
  return candidates.best_candidate(x_SD, c_KD, label_S, best_S[:, None])[1]


@jax.jit
def _candidates_cosines(c_KD, x_SD, label_S, ids_SC):
  return candidates.best_candidate(x_SD, c_KD, label_S, ids_SC)[1]


@functools.partial(jax.jit, static_argnums=5)
def _screened_cosines(c_KD, cs_KP, x_SD, basis_DP, label_S, num_centers):
  xs_SP = (x_SD @ basis_DP).astype(cs_KP.dtype)
  ids_SC = candidates.best_of_buckets(cs_KP, xs_SP, num_centers)
  return _candidates_cosines(c_KD, x_SD, label_S, ids_SC)


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
