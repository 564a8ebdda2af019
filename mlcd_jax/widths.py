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

# What a width may cost the mean cosine of a sample when it is chosen, and a
# pass as a share of it before candidates are sought anew. The first is as good
# as nothing: what early passes lose grows, since a point that goes to its best
# center draws others after it.
MAX_LOSS = 1e-5
MAX_PASS_LOSS = 1e-4

# Sampled rows: all of them; to choose a width by; to check a pass by, of which
# it is a share that takes little time.
_SAMPLE_ROWS = 2_048
_CHOICE_ROWS = 1_024
_CHECKED_SHARE = 1 / 64

# Below these a pass is too short for screening to gain; above this candidates
# would take more than 2 GiB.
_MIN_CENTERS = 512
_MIN_DIM = 256
_MAX_ROWS = 2**31 // (4 * candidates.COUNT)

# Centers whose leading dimensions are taken.
_BASIS_ROWS = 4_096


def pay(num_rows: int, dim: int, num_centers: int) -> bool:
  """Whether a clustering is large enough to be screened."""
  return (
    _SAMPLE_ROWS <= num_rows <= _MAX_ROWS
    and num_centers >= _MIN_CENTERS
    and dim >= _MIN_DIM
  )


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
    checked = nearest.up(int(_CHECKED_SHARE * embeddings.shape[0]), 256)
    self._checked = min(checked, count)
    self._score_dtype = score_dtype

  def choose(
    self, c_KD: jax.Array, labels_S: np.ndarray, spare: int
  ) -> np.ndarray | None:
    """The fewest leading dimensions that are good enough.

    Args:
      c_KD: whole centers.
      labels_S: of the sample in the pass before.
      spare: take so many widths more, for the few points that a sample of this
        size does not show.

    Returns:
      float32 [D, P], None if all dimensions are needed.
    """
    few = slice(None, None, -(-len(self.rows) // _CHOICE_ROWS))
    values, labels = self._values[few], labels_S[few]
    best_S = self._best_cosines(c_KD, values, labels)
    widths = [width for width in _WIDTHS if width <= len(self.mean) // 2]
    basis = _leading(c_KD, self.mean, widths[-1], self.num_centers)
    scored = self.scored(c_KD, basis)
    for width, taken in zip(widths, widths[spare:]):
      loss = _screened_loss(
        c_KD, scored, values, basis, labels, best_S, width, self.num_centers
      )
      _log.info('screening: %d dimensions would cost %.1e', width, loss)
      if loss < MAX_LOSS:
        return np.asarray(basis)[:, :taken]
    return None

  def loss(
    self, c_KD: jax.Array, labels_S: np.ndarray, iteration: int
  ) -> float:
    """The share of the mean cosine that labels lose to the best centers.

    Every iteration looks at other rows of the sample.

    Args:
      c_KD: whole centers.
      labels_S: of the sample.
      iteration: chooses the rows.
    """
    rng = np.random.default_rng(iteration)
    few = rng.choice(len(self.rows), self._checked, replace=False)
    values, labels = self._values[few], labels_S[few]
    best_S = self._best_cosines(c_KD, values, labels)
    return float(_lost(c_KD, values, labels, best_S))

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
  return candidates.compare(x_SD, c_KD, label_S, best_S[:, None])[1]


@jax.jit
def _lost(c_KD, x_SD, label_S, best_S):
  own_S = jnp.sum(x_SD * c_KD[label_S], axis=1)
  return jnp.sum(jnp.maximum(best_S - own_S, 0)) / jnp.sum(best_S)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _screened_loss(
  c_KD, cs_KP, x_SD, basis_DP, label_S, best_S, width, num_centers
):
  """What the mean cosine loses if `width` dimensions are scored."""
  cs_KP = cs_KP[:, :width]
  xs_SP = (x_SD @ basis_DP[:, :width]).astype(cs_KP.dtype)
  ids_SC = candidates.seek(cs_KP, xs_SP, num_centers)
  _, found_S, _ = candidates.compare(x_SD, c_KD, label_S, ids_SC)
  return jnp.mean(jnp.maximum(best_S - found_S, 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leading(c_KD, mean_D, width, num_centers):
  """The leading directions [D, P] of some centers, the first ones first."""
  rows = np.linspace(0, num_centers - 1, min(_BASIS_ROWS, num_centers))
  c_SD = c_KD[rows.astype(int)] - mean_D[None]
  _, vectors = jnp.linalg.eigh(c_SD.T @ c_SD)
  return vectors[:, ::-1][:, :width]
