"""The tuning of a screened clustering by a sample of its rows.

The sample answers three questions:

  1. How many leading dimensions are enough? A full search scores the centers on
     these only. Fewer cost less but miss more of the best centers.
  2. How much has the cosine of a row to a center grown in an update? This
     decides which rows have stale candidates, as `candidates.py` explains.
  3. How much of the objective did a pass lose by its approximations?

The leading dimensions are the principal directions of the centers, since scores
have to tell centers apart. They must not be fitted to the sample. If they were,
full searches would lose less on the sample than on other rows. In an experiment
the sample then showed no loss, while the objective was 4e-4 lower.

Shapes: K centers, D dimensions, P leading dimensions, S sampled rows, C
candidates of a row.
"""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlcd_jax.kmeans import chunks
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles
from mlcd_jax.kmeans.fast import candidates

_log = logging.getLogger(__name__)

# The widths, which are numbers of leading dimensions, to choose from. Each is a
# fifth to a half larger than the one before. Those above half of all dimensions
# are not used.
_WIDTHS = (96, 128, 160, 192, 256, 384)

# The next width is taken to lose at best an eighth of what a width loses. So a
# loss of 64 times the limit rules out the next width too, without a trial.
_LOSS_RATIO = 8

# Sampled rows, at most, that a width is tried on and growth is estimated from.
_CHOICE_ROWS = 1_024

# The share of all rows that a pass is checked by. The check then takes 0.015 of
# the 0.12 to 0.29 seconds of a quick pass over 100,000 rows.
_CHECKED_SHARE = 1 / 64

# Rows and centers of a tile of the sample's scores, which take 1 MiB in float32
# and stay in the cache.
_TILE = (256, 1_024)

# The most centers that the leading dimensions are computed from, so that the
# time does not grow with the number of centers.
_BASIS_ROWS = 4_096


class Limits(NamedTuple):
  """The limits of what screening may lose.

  Attributes:
    width_loss: how much the mean cosine of the sample may lose by scoring fewer
      dimensions. The default is almost nothing, because losses of early passes
      grow: a row with a wrong center draws other rows after it. With 5e-5 the
      objective of 24,576 rows of loose data ended 1e-4 to 3e-4 lower.
    pass_loss: the share of the mean cosine that a pass may lose. If it loses
      more, more rows get a full search in later passes.
    rise_deviations: how much the cosine of a row to a center is taken to grow
      at most in an update: the mean growth plus this many standard deviations.
      The first number is for the first update, the second for later updates,
      which move centers less. With fewer deviations runs ended 1e-4 lower.
    full_search_worth: how much the mean cosine must gain by a full search of
      all rows for the search to be worth its time. A full search of some rows
      must gain as much per row.
    stale_share: the share of rows with stale candidates above which the next
      pass searches all rows fully. The width is then chosen anew, and a smaller
      one may be enough.
  """

  width_loss: float = 1e-5
  pass_loss: float = 1e-4
  rise_deviations: tuple[float, float] = (3, 2.5)
  full_search_worth: float = 3e-4
  stale_share: float = 0.5


class Tuner:
  """A tuner of a screened clustering, which measures it on a sample.

  Attributes:
    sample: the sample of the rows.
    limits: the limits of what may be lost.
  """

  def __init__(
    self,
    sample: chunks.Sample,
    *,
    num_rows: int,
    num_centers: int,
    score_dtype: jnp.dtype,
    limits: Limits,
  ):
    """Decides how many rows of the sample each measurement uses.

    Args:
      sample: the sample of all rows.
      num_rows: the number of all rows.
      num_centers: K.
      score_dtype: the type that rows and centers are rounded to for scoring.
      limits: the limits of what may be lost.
    """
    self.sample = sample
    self.limits = limits
    self._num_centers = num_centers
    self._score_dtype = score_dtype
    count = len(sample.rows)
    num_tiles = max(1, int(_CHECKED_SHARE * num_rows) // _TILE[0])
    self._checked = min(num_tiles * _TILE[0], _CHOICE_ROWS, count)
    self._choice = slice(None, None, -(-count // _CHOICE_ROWS))

  def leading_dimensions(self, c_KD: jax.Array) -> np.ndarray:
    """Returns the leading dimensions of the centers.

    Returns:
      Orthonormal columns, float32 [D, P], the most important first. P is the
      largest width to choose from.
    """
    width = self._widths()[-1]
    mean = self.sample.mean
    return np.asarray(_leading(c_KD, mean, width, self._num_centers))

  def choose_width(
    self, c_KD: jax.Array, basis_DP: np.ndarray, labels_S: np.ndarray
  ) -> int:
    """Returns the fewest leading dimensions that are enough for the sample.

    They are enough if a full search on them lowers the mean cosine by less than
    Limits.width_loss.

    Args:
      c_KD: all centers.
      basis_DP: the leading dimensions.
      labels_S: the labels of the sample in the pass before.

    Returns:
      The number of leading dimensions, or 0 if all dimensions are needed.
    """
    rows, labels = self.sample.rows[self._choice], labels_S[self._choice]
    best_S = self._best_cosines(c_KD, rows, labels)
    scored_KP, xs_SP = self.scored(c_KD, basis_DP), rows @ basis_DP
    widths = self._widths()
    i = 0
    while i < len(widths):
      loss = _screened_loss(
        c_KD,
        scored_KP[:, : widths[i]],
        rows,
        xs_SP[:, : widths[i]],
        labels,
        best_S,
        num_centers=self._num_centers,
      )
      _log.debug('screening: %d dimensions would lose %.1e', widths[i], loss)
      if loss < self.limits.width_loss:
        return widths[i]
      i += max(1, int(math.log(loss / self.limits.width_loss, _LOSS_RATIO)))
    return 0

  def age(
    self,
    before: candidates.Centers,
    c_KD: jax.Array,
    labels: candidates.Labels,
    *,
    is_first: bool,
  ) -> tuple[float, float]:
    """Estimates how much an update raised cosines and made candidates stale.

    Args:
      before: the centers before the update, with the reach so far.
      c_KD: all centers after the update.
      labels: the labels of the sample from the pass before the update.
      is_first: whether the update was the first of the run.

    Returns:
      Two numbers. The first is an estimate of how much the cosine of a row to a
      center has grown at most in this update; the caller adds it to the reach.
      The second is the share of rows whose candidates are stale after that.
    """
    rows, ids_SC = self.sample.rows[self._choice], labels.ids_nC[self._choice]
    change_SC, best_S = map(
      np.asarray, _change(before.c_KD, c_KD, rows, ids_SC)
    )
    # The changes of candidates stand for those of all centers near the row.
    deviations = self.limits.rise_deviations[0 if is_first else 1]
    rise = max(0.0, float(change_SC.mean() + deviations * change_SC.std()))
    stale_S = best_S < labels.floor_n[self._choice] + before.reach + rise
    return rise, float(stale_S.mean())

  def check(
    self,
    centers: candidates.Centers,
    labels: candidates.Labels,
    iteration: int,
  ) -> float:
    """Compares the labels of a pass with the best centers, and tunes the reach.

    Each iteration compares a few rows of the sample, other rows each time. If
    they lost too much, which a single row can cause, the whole sample is
    compared. If that lost too much as well, the reach was too small: too few
    rows counted as stale and got a full search.

    Args:
      centers: the centers of the pass.
      labels: the labels of the sample.
      iteration: the number of the iteration, which chooses the rows.

    Returns:
      The reach that the pass should have had. It is the one that it had, or the
      larger one that is best for the sample: with it the gain of full searches
      exceeds their cost (see Limits.full_search_worth) by the most.
    """
    rng = np.random.default_rng(iteration)
    few = rng.choice(len(self.sample.rows), self._checked, replace=False)
    for part in few, slice(None):
      rows, labels_S = self.sample.rows[part], labels.label_n[part]
      best_S = self._best_cosines(centers.c_KD, rows, labels_S)
      own_S, lost_S = map(
        np.asarray, _lost(centers.c_KD, rows, labels_S, best_S)
      )
      loss = lost_S.sum() / np.asarray(best_S).sum()
      _log.debug('screening: the pass lost %.1e of the objective', loss)
      if loss <= self.limits.pass_loss:
        return centers.reach
    # With a reach r, rows whose margin is below r are stale and get a full
    # search. So the rows are put in order of falling margin, and cost[i] is the
    # cost of leaving out the first i of them: what these lose, minus the worth
    # of the time that is saved.
    margin_S = own_S - labels.floor_n
    order = np.argsort(-margin_S)
    worth = lost_S[order] - self.limits.full_search_worth
    cost = np.append(0, np.cumsum(worth))
    margin = np.append(margin_S[order], -np.inf)[np.argmin(cost)]
    return max(centers.reach, float(margin))

  def scored(self, c_KD: jax.Array, basis: np.ndarray | None) -> jax.Array:
    """Prepares centers for scoring.

    Args:
      c_KD: all centers.
      basis: the leading dimensions [D, P], or None to score all.

    Returns:
      The centers minus the mean of the rows, on the leading dimensions [K, P]
      or on all [K, D], in the type of scores.
    """
    return _scored(c_KD, self.sample.mean, basis, self._score_dtype)

  def _widths(self) -> list[int]:
    """Returns the widths to choose from: at most half of all dimensions."""
    return [width for width in _WIDTHS if width <= len(self.sample.mean) // 2]

  def _best_cosines(self, c_KD, rows, labels):
    """Returns the cosine of each row to its best center [S], float32.

    A search of all centers in low precision finds the best center. If it is
    worse than the center of the row's label, that one is taken.
    """
    return _best_cosines(c_KD, self.scored(c_KD, None), rows, labels)


@functools.partial(jax.jit, static_argnames='dtype')
def _scored(c_KD, mean_D, basis_DP, dtype):
  """Does what `Tuner.scored` describes."""
  centered_KP = c_KD - mean_D[None]
  if basis_DP is not None:
    centered_KP = centered_KP @ basis_DP
  return centered_KP.astype(dtype)


@jax.jit
def _best_cosines(c_KD, scored_KD, x_SD, label_S):
  """Does what `Tuner._best_cosines` describes."""
  rows, limit = _TILE
  _, best_S = search.best_center(
    scored_KD,
    x_SD.astype(scored_KD.dtype),
    tile=(rows, tiles.largest_divisor(len(scored_KD), limit)),
  )
  return candidates.compare(x_SD, c_KD, label_S, best_S[:, None])[1]


@jax.jit
def _change(before_KD, c_KD, x_SD, ids_SC):
  """Measures how an update changed the cosines of rows to their candidates.

  Returns:
    The change of each cosine [S, C], and the best cosine after the update [S].
  """
  before_SC = search.tiled_cosines(x_SD, before_KD, ids_SC)
  now_SC = search.tiled_cosines(x_SD, c_KD, ids_SC)
  return now_SC - before_SC, jnp.max(now_SC, axis=1)


@jax.jit
def _lost(c_KD, x_SD, label_S, best_S):
  """Returns the cosines to the labels' centers and what they lack to best_S."""
  own_S = jnp.sum(x_SD * c_KD[label_S], axis=1)
  return own_S, jnp.maximum(best_S - own_S, 0)


@functools.partial(jax.jit, static_argnames='num_centers')
def _screened_loss(
  c_KD, scored_KP, x_SD, xs_SP, label_S, best_S, *, num_centers
):
  """Returns how much the mean cosine of a full search loses by screening.

  Args:
    c_KD: all centers.
    scored_KP: the centers on the leading dimensions.
    x_SD: unit rows.
    xs_SP: the rows on the leading dimensions.
    label_S: the labels of the rows.
    best_S: the cosines of the rows to their best centers.
    num_centers: K without padding.
  """
  ids_SC = candidates.seek(
    scored_KP, xs_SP.astype(scored_KP.dtype), num_centers
  )
  _, found_S, *_ = candidates.compare(x_SD, c_KD, label_S, ids_SC)
  return jnp.mean(jnp.maximum(best_S - found_S, 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leading(c_KD, mean_D, width, num_centers):
  """Returns the `width` first principal directions of the centers [D, P]."""
  rows = np.linspace(0, num_centers - 1, min(_BASIS_ROWS, num_centers))
  c_SD = c_KD[rows.astype(int)] - mean_D[None]
  # eigh sorts by growing eigenvalue: the last columns lead.
  _, vectors = jnp.linalg.eigh(c_SD.T @ c_SD)
  return vectors[:, ::-1][:, :width]
