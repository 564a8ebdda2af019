"""Scores on leading dimensions, and the width at which they are good enough.

The leading dimensions are those of the centers: what separates centers is what
a score must see. They must not be those of the sample that is looked at, which
would be served better than other points. Shapes: K centers, D dimensions, P
leading dimensions, S sampled points.
"""

import functools
import logging
import math

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
# pass as a share of it before more is searched anew. The first is as good as
# nothing: what early passes lose grows, since a point that goes to its best
# center draws others after it.
_MAX_LOSS = 1e-5
_MAX_PASS_LOSS = 1e-4

# What is taken for the most that a center comes nearer to a point: so many
# standard deviations above the mean, in the first update and in later ones,
# which move centers less. With fewer, runs end lower than exact ones by 1e-4.
_RISE_DEVIATIONS = (3, 2.5)

# What searching anew for all points must save of the mean cosine to pay.
_WORTH = 3e-4

# Sampled rows: all of them; to choose a width by; to check a pass by, a share
# of all rows that takes little time.
_SAMPLE_ROWS = 2_048
_CHOICE_ROWS = 1_024
_CHECKED_SHARE = 1 / 64

# Below these a pass is too short for screening to gain; above this candidates
# would take more than 2 GiB.
_MIN_CENTERS = 512
_MIN_DIM = 256
_MAX_ROWS = 2**31 // (4 * candidates.COUNT)

# Rows and centers of a tile of the sample's scores.
_TILE = (256, 1_024)

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
    tiles = int(_CHECKED_SHARE * embeddings.shape[0]) // _TILE[0]
    self._checked = min(max(1, tiles) * _TILE[0], _CHOICE_ROWS, count)
    self._score_dtype = score_dtype

  def leading(self, c_KD: jax.Array) -> np.ndarray:
    """The leading dimensions of whole centers, the first ones first.

    Returns:
      float32 [D, P], of the largest width that there is to choose.
    """
    width = self._widths()[-1]
    return np.asarray(_leading(c_KD, self.mean, width, self.num_centers))

  def choose(
    self,
    c_KD: jax.Array,
    basis_DP: np.ndarray,
    labels_S: np.ndarray,
  ) -> int:
    """How many leading dimensions are enough: as few as can be.

    Args:
      c_KD: whole centers.
      basis_DP: the leading dimensions.
      labels_S: of the sample in the pass before.

    Returns:
      Their number, 0 if all dimensions are needed.
    """
    few = self._few()
    values, labels = self._values[few], labels_S[few]
    best_S = self._best_cosines(c_KD, values, labels)
    cs_KP, xs_SP = self.scored(c_KD, basis_DP), values @ basis_DP
    widths = self._widths()
    i = 0
    while i < len(widths):
      loss = _screened_loss(
        c_KD, cs_KP, values, xs_SP, labels, best_S, widths[i], self.num_centers
      )
      _log.info('screening: %d dimensions would cost %.1e', widths[i], loss)
      if loss < _MAX_LOSS:
        return widths[i]
      # The next width costs an eighth of it at best.
      i += max(1, int(math.log(loss / _MAX_LOSS, 8)))
    return 0

  def age(
    self,
    before: candidates.Search,
    c_KD: jax.Array,
    found: candidates.Found,
    *,
    is_first: bool,
  ) -> tuple[float, float]:
    """What an update does to candidates.

    Args:
      before: what was searched, with the reach until now.
      c_KD: whole centers after the update.
      found: of the sample.
      is_first: whether the update was the run's first.

    Returns:
      How much nearer a center near a point may have come to it, about, which is
      to be added to the reach; and the share of points whose candidates are
      older than that.
    """
    few = self._few()
    change_SC, best_S = map(
      np.asarray,
      _change(before.c_KD, c_KD, self._values[few], found.ids_nC[few]),
    )
    deviations = _RISE_DEVIATIONS[0 if is_first else 1]
    rise = max(0.0, float(change_SC.mean() + deviations * change_SC.std()))
    old_S = best_S < found.floor_n[few] + before.reach + rise
    return rise, float(old_S.mean())

  def check(
    self, among: candidates.Search, found: candidates.Found, iteration: int
  ) -> float:
    """Compares labels with the best centers.

    Every iteration looks at a few other rows of the sample. If they lose too
    much, which one row can do, all of it is asked. If that does too, the reach
    becomes what is worth the time by these rows.

    Args:
      among: what was searched.
      found: of the sample.
      iteration: chooses the rows.

    Returns:
      The reach that the pass should have had.
    """
    rng = np.random.default_rng(iteration)
    few = rng.choice(len(self.rows), self._checked, replace=False)
    for rows in few, slice(None):
      values, labels = self._values[rows], found.label_n[rows]
      best_S = self._best_cosines(among.c_KD, values, labels)
      own_S, lost_S = map(np.asarray, _lost(among.c_KD, values, labels, best_S))
      loss = lost_S.sum() / np.asarray(best_S).sum()
      _log.info('screening: the pass cost %.1e of the objective', loss)
      if loss <= _MAX_PASS_LOSS:
        return among.reach
    # What is kept with a reach are the rows with a larger margin.
    margin_S = own_S - found.floor_n
    order = np.argsort(-margin_S)
    cost = np.append(0, np.cumsum(lost_S[order] - _WORTH))
    margin = np.append(margin_S[order], -np.inf)[np.argmin(cost)]
    return max(among.reach, float(margin))

  def scored(self, c_KD: jax.Array, basis: np.ndarray | None) -> jax.Array:
    """What is scored of whole centers: [K, P], or [K, D] without a basis."""
    return _scored(c_KD, self.mean, basis, self._score_dtype)

  def _few(self) -> slice:
    return slice(None, None, -(-len(self.rows) // _CHOICE_ROWS))

  def _widths(self) -> list[int]:
    return [width for width in _WIDTHS if width <= len(self.mean) // 2]

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
  rows, most = _TILE
  _, best_S = nearest.best_center(
    cs_KD,
    x_SD.astype(cs_KD.dtype),
    tile=(rows, nearest.divisor(len(cs_KD), most)),
  )
  return candidates.compare(x_SD, c_KD, label_S, best_S[:, None])[1]


@jax.jit
def _change(before_KD, c_KD, x_SD, ids_SC):
  """How cosines to candidates changed [S, C], and the best of them now."""
  before_SC = candidates.tiled_cosines(x_SD, before_KD, ids_SC)
  now_SC = candidates.tiled_cosines(x_SD, c_KD, ids_SC)
  return now_SC - before_SC, jnp.max(now_SC, axis=1)


@jax.jit
def _lost(c_KD, x_SD, label_S, best_S):
  """Cosines to the labels' centers, and what these lose."""
  own_S = jnp.sum(x_SD * c_KD[label_S], axis=1)
  return own_S, jnp.maximum(best_S - own_S, 0)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _screened_loss(
  c_KD, cs_KP, x_SD, xs_SP, label_S, best_S, width, num_centers
):
  """What the mean cosine loses if `width` dimensions are scored."""
  xs_SP = xs_SP.astype(cs_KP.dtype)
  ids_SC = candidates.seek(cs_KP[:, :width], xs_SP[:, :width], num_centers)
  _, found_S, *_ = candidates.compare(x_SD, c_KD, label_S, ids_SC)
  return jnp.mean(jnp.maximum(best_S - found_S, 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leading(c_KD, mean_D, width, num_centers):
  """The leading directions [D, P] of some centers, the first ones first."""
  rows = np.linspace(0, num_centers - 1, min(_BASIS_ROWS, num_centers))
  c_SD = c_KD[rows.astype(int)] - mean_D[None]
  _, vectors = jnp.linalg.eigh(c_SD.T @ c_SD)
  return vectors[:, ::-1][:, :width]
