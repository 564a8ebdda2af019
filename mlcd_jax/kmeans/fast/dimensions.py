"""Tunes a screened clustering by a sample of its rows.

Scores on a few leading dimensions cost less than on all. A sample of the rows
says how many are enough, how far an update moves centers towards rows, and what
a pass lost.

The leading dimensions are those of the centers: what separates centers is what
a score must see. They must not be fitted to the sample, which would then be
served better than other rows: the check once saw no loss while the objective
lost 4e-4.

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

# Numbers of leading dimensions to choose from, each about a quarter larger than
# the one before, up to half of all dimensions.
_WIDTHS = (96, 128, 160, 192, 256, 384)

# The next width costs an eighth of it at best; so many can be left out.
_LOSS_RATIO = 8

# Sampled rows by which a width is chosen.
_CHOICE_ROWS = 1_024

# Share of all rows by which a pass is checked: it takes 0.015 of the 0.12 to
# 0.29 seconds of a pass over 100,000 rows.
_CHECKED_SHARE = 1 / 64

# Rows and centers of a tile of the sample's scores, which stay in the cache.
_TILE = (256, 1_024)

# Centers that the leading dimensions are computed from, at most, so that its
# time does not grow with the number of centers.
_BASIS_ROWS = 4_096


class Limits(NamedTuple):
  """What screening may cost.

  Attributes:
    width_loss: of the sample's mean cosine, when a number of leading dimensions
      is chosen. The default is as good as nothing: losses of early passes grow,
      since a row that goes to its best center draws others after it. With 5e-5
      24,576 rows of loose data ended 1e-4 to 3e-4 lower.
    pass_loss: share of the mean cosine that a pass may lose before more rows
      are searched anew.
    rise_deviations: the most that a center is taken to gain on a row, in
      standard deviations above the mean; in the first update, and in later
      ones, which move centers less. With fewer, runs end 1e-4 lower.
    full_search_worth: what a full search of all rows must gain of the mean
      cosine to be worth its time.
    stale_share: share of stale rows above which the next pass searches all rows
      fully. Then fewer dimensions may do.
  """

  width_loss: float = 1e-5
  pass_loss: float = 1e-4
  rise_deviations: tuple[float, float] = (3, 2.5)
  full_search_worth: float = 3e-4
  stale_share: float = 0.5


class Tuner:
  """Measures a screened clustering on sampled rows.

  Attributes:
    sample: the rows.
    limits: what may be lost.
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
    """Takes the sample.

    Args:
      sample: of all rows.
      num_rows: number of all rows.
      num_centers: K.
      score_dtype: type of the products' operands.
      limits: what may be lost.
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
    """Returns the leading dimensions of all centers, the first ones first.

    Returns:
      float32 [D, P], with as many as the largest width there is to choose.
    """
    width = self._widths()[-1]
    mean = self.sample.mean
    return np.asarray(_leading(c_KD, mean, width, self._num_centers))

  def choose_width(
    self, c_KD: jax.Array, basis_DP: np.ndarray, labels_S: np.ndarray
  ) -> int:
    """Returns the smallest number of leading dimensions that is enough.

    Args:
      c_KD: all centers.
      basis_DP: the leading dimensions.
      labels_S: of the sample, in the pass before.

    Returns:
      The number, or 0 if all dimensions are needed.
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
    """Estimates what an update does to candidates.

    Args:
      before: the centers that were searched, with the reach until now.
      c_KD: all centers after the update.
      labels: of the sample.
      is_first: whether the update was the run's first.

    Returns:
      The largest increase in cosine between a row and a nearby center in this
      update, which is to be added to the reach; and the share of rows whose
      candidates are then stale.
    """
    rows, ids_SC = self.sample.rows[self._choice], labels.ids_nC[self._choice]
    change_SC, best_S = map(
      np.asarray, _change(before.c_KD, c_KD, rows, ids_SC)
    )
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
    """Compares the labels of a pass with the best centers.

    Every iteration looks at a few other rows of the sample. If they lose too
    much, which one row can do, the whole sample is compared. If that loses too
    much as well, the reach was estimated too low.

    Args:
      centers: those that were searched.
      labels: of the sample.
      iteration: chooses the rows.

    Returns:
      The reach that the pass should have had: the one it had, or the one whose
      searches would have been worth their time on the sample.
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
    # A reach searches the rows whose margin is below it.
    margin_S = own_S - labels.floor_n
    order = np.argsort(-margin_S)
    worth = lost_S[order] - self.limits.full_search_worth
    cost = np.append(0, np.cumsum(worth))
    margin = np.append(margin_S[order], -np.inf)[np.argmin(cost)]
    return max(centers.reach, float(margin))

  def scored(self, c_KD: jax.Array, basis: np.ndarray | None) -> jax.Array:
    """Returns what is scored of all centers: [K, P], [K, D] without a basis."""
    return _scored(c_KD, self.sample.mean, basis, self._score_dtype)

  def _widths(self) -> list[int]:
    return [width for width in _WIDTHS if width <= len(self.sample.mean) // 2]

  def _best_cosines(self, c_KD, rows, labels):
    """Returns cosines to the best centers in low precision, or the labels'."""
    return _best_cosines(c_KD, self.scored(c_KD, None), rows, labels)


@functools.partial(jax.jit, static_argnames='dtype')
def _scored(c_KD, mean_D, basis_DP, dtype):
  centered_KP = c_KD - mean_D[None]
  if basis_DP is not None:
    centered_KP = centered_KP @ basis_DP
  return centered_KP.astype(dtype)


@jax.jit
def _best_cosines(c_KD, scored_KD, x_SD, label_S):
  rows, limit = _TILE
  _, best_S = search.best_center(
    scored_KD,
    x_SD.astype(scored_KD.dtype),
    tile=(rows, tiles.largest_divisor(len(scored_KD), limit)),
  )
  return candidates.compare(x_SD, c_KD, label_S, best_S[:, None])[1]


@jax.jit
def _change(before_KD, c_KD, x_SD, ids_SC):
  """Returns how cosines to candidates changed [S, C], and the best one now."""
  before_SC = search.tiled_cosines(x_SD, before_KD, ids_SC)
  now_SC = search.tiled_cosines(x_SD, c_KD, ids_SC)
  return now_SC - before_SC, jnp.max(now_SC, axis=1)


@jax.jit
def _lost(c_KD, x_SD, label_S, best_S):
  """Returns the cosines to the labels' centers, and what these lose."""
  own_S = jnp.sum(x_SD * c_KD[label_S], axis=1)
  return own_S, jnp.maximum(best_S - own_S, 0)


@functools.partial(jax.jit, static_argnames='num_centers')
def _screened_loss(
  c_KD, scored_KP, x_SD, xs_SP, label_S, best_S, *, num_centers
):
  """Returns what the mean cosine loses if these dimensions are scored."""
  ids_SC = candidates.seek(
    scored_KP, xs_SP.astype(scored_KP.dtype), num_centers
  )
  _, found_S, *_ = candidates.compare(x_SD, c_KD, label_S, ids_SC)
  return jnp.mean(jnp.maximum(best_S - found_S, 0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leading(c_KD, mean_D, width, num_centers):
  """Returns the leading directions [D, P] of centers, the first ones first."""
  rows = np.linspace(0, num_centers - 1, min(_BASIS_ROWS, num_centers))
  c_SD = c_KD[rows.astype(int)] - mean_D[None]
  _, vectors = jnp.linalg.eigh(c_SD.T @ c_SD)
  return vectors[:, ::-1][:, :width]
