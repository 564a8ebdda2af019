"""Screened assignment: by a few candidates of each point, for CPUs.

A full search finds every point's candidates on leading dimensions. The passes
after it are quick: they look at these alone, and move the points whose label
changed from one sum to another. So it goes until a sample shows that a pass
cost too much, or a center was restarted. Programs are in candidates.py, the
choice of the dimensions in widths.py.

Shapes: N points, K centers, D dimensions, P leading dimensions, C candidates of
a point.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import candidates
from mlcd_jax import lloyd_programs
from mlcd_jax import points
from mlcd_jax import widths

_log = logging.getLogger(__name__)

# The pass that searches fully again, since centers move far in the first ones.
# Its candidates serve long, so that it takes a width to spare.
_SECOND = 2
_SPARE = 1


class Screening:
  """What is known of the points between passes.

  Its state, by name:
    labels: int32 [N] of the last pass.
    scores: float32 [N], the points' cosines to them when they were last looked
      at, infinite for points that are left out.
    leads: float32 [N], at least how far these are ahead of all candidates'.
    candidates: int32 [N, C].
    drift: float32 [K], how far centers moved in the last update; infinite if
      the next pass searches fully.
    basis: float32 [D, P], the leading dimensions; empty if all are needed.
    pays: whether it goes on being screened.
  """

  def __init__(
    self,
    mesh: Mesh,
    sample: widths.Sample,
    chunks: points.Points,
    *,
    score_dtype: jnp.dtype,
    start: Any,
  ):
    """Starts, or goes on.

    Args:
      mesh: of all devices.
      sample: of the points.
      chunks: of the points.
      score_dtype: of the products' operands.
      start: what was done; of a run that was screened, or that begins.
    """
    self._mesh = mesh
    self._num_centers = sample.num_centers
    self._chunks = chunks
    self._sample = sample
    self._score_dtype = score_dtype
    known = start.known
    nothing = np.zeros(0)
    self._labels = chunks.put(known.get('labels', nothing), np.int32)
    self._scores = chunks.put(
      known.get('scores', nothing), np.float32, padding=np.inf
    )
    self._leads = chunks.put(known.get('leads', nothing), np.float32)
    self._candidates = chunks.put(
      known.get('candidates', nothing), np.int32, (candidates.COUNT,)
    )
    unknown = np.full(self._num_centers, np.inf, np.float32)
    self._drift = known.get('drift', unknown)
    basis = known.get('basis', nothing)
    self._basis = basis if basis.size else None
    self._pays = bool(known.get('pays', True))
    self._iteration = len(start.objective)
    self._is_within = start.is_within

  def state(self) -> dict[str, np.ndarray]:
    """What is known, on the host."""
    return {
      'labels': self._chunks.get(self._labels),
      'scores': self._chunks.get(self._scores),
      'leads': self._chunks.get(self._leads),
      'candidates': self._chunks.get(self._candidates),
      'drift': self._drift,
      'basis': np.zeros((0, 0)) if self._basis is None else self._basis,
      'pays': np.asarray(self._pays),
    }

  @property
  def is_quick(self) -> bool:
    """Whether the next pass starts from the sums and counts of the last."""
    return bool(np.isfinite(self._drift).all())

  def begin(self, c_KD: jax.Array) -> bool:
    """Before a pass: whether it can be screened."""
    if not self._pays:
      return False
    self._whole = candidates.make_whole(self._mesh, self._num_centers)(c_KD)
    if not self.is_quick:
      if not self._is_within:
        spare = _SPARE if self._iteration else 0
        self._basis = self._sample.choose(
          self._whole, self._sampled(self._labels), spare
        )
      self._scored = self._sample.scored(self._whole, self._basis)
    self._is_within = False
    return True

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Adds a chunk of points to sums and counts, which are given up.

    The search does not wait for the chunks before, so that a CPU's cores can
    search several chunks at once.

    Returns:
      sums, counts, cosines [n] of the points, number of bad points.
    """
    add = self._add_quick if self.is_quick else self._add_full
    return add(sums, counts, chunk, x_nD)

  def _add_full(self, sums, counts, chunk, x_nD):
    search = candidates.make_full_search(
      self._mesh, self._num_centers, self._score_dtype
    )
    label_n, score_n, self._leads[chunk], self._candidates[chunk] = search(
      self._whole, self._scored, self._basis, x_nD, self._labels[chunk]
    )
    accumulate = lloyd_programs.make_accumulate(self._mesh)
    found = accumulate(sums, counts, x_nD, label_n, score_n)
    self._labels[chunk], self._scores[chunk] = label_n, found[2]
    return found

  def _add_quick(self, sums, counts, chunk, x_nD):
    search = candidates.make_quick_search(self._mesh)
    before_n = self._labels[chunk]
    label_n, score_n, lead_n = search(
      self._whole,
      self._drift,
      x_nD,
      before_n,
      self._scores[chunk],
      self._leads[chunk],
      self._candidates[chunk],
    )
    move = lloyd_programs.make_move(self._mesh)
    sums, counts = move(sums, counts, x_nD, before_n, label_n)
    self._labels[chunk], self._scores[chunk] = label_n, score_n
    self._leads[chunk] = lead_n
    return sums, counts, score_n, 0

  def finish(self, shift: np.ndarray) -> None:
    """After the update: what the next pass must look at.

    Args:
      shift: [K], how far each center moved; infinite if it was restarted.
    """
    lost = self.is_quick and self._lost_too_much()
    early = self._iteration < _SECOND
    # If it is late and all dimensions were scored, candidates do not serve.
    self._pays = not (lost and not early and self._basis is None)
    if lost or self._iteration == _SECOND - 1:
      shift = np.full_like(shift, np.inf)
    self._iteration += 1
    self._drift = shift

  def _lost_too_much(self) -> bool:
    """Whether too many of a sample are not with their best centers."""
    loss = self._sample.loss(
      self._whole, self._sampled(self._labels), self._iteration
    )
    _log.info('screening: the pass cost %.1e of the objective', loss)
    return loss > widths.MAX_PASS_LOSS

  def _sampled(self, parts: list[jax.Array]) -> np.ndarray:
    return self._chunks.get(parts)[self._sample.rows]
