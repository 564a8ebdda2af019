"""Screened assignment: by a few candidates of each point, for CPUs.

A full search finds every point's candidates on leading dimensions, and the
passes after it look at these alone, until a sample shows that they cost too
much, a center was restarted, or as many passes are done as they may serve.
Programs are in candidates.py, the choice of the dimensions in widths.py.

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

# The candidates of pass i serve up to pass 3 i: centers move less and less. So
# those of the first, whose centers were single rows, serve for no other.
_SERVE = 3


class Screening:
  """What is known of the points between passes.

  Attributes:
    labels: int32 [N] of the last pass.
    scores: float32 [N], the points' cosines to them.
    drift: float32 [K], how far centers moved in the last update; infinite if
      the next pass searches fully.
    candidates: int32 [N, C].
    searched: the pass whose candidates they are.
    basis: float32 [D, P], the leading dimensions.
    width: P, 0 if all dimensions are needed.
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
    """Starts, or goes on from an object with these attributes.

    Args:
      mesh: of all devices.
      sample: of the points.
      chunks: of the points.
      score_dtype: of the products' operands.
      start: has an objective too, and the part of the pass that has begun.
    """
    self._mesh = mesh
    self._num_centers = sample.num_centers
    self._chunks = chunks
    self._sample = sample
    self._score_dtype = score_dtype
    self._labels = chunks.put(start.labels, np.int32)
    self._scores = chunks.put(start.scores, np.float32)
    self._candidates = chunks.put(
      start.candidates, np.int32, (candidates.COUNT,)
    )
    self.drift = start.drift
    if not len(self.drift):
      self.drift = np.full(self._num_centers, np.inf, np.float32)
    self.searched = start.searched
    self.basis, self.width = start.basis, start.width
    self._iteration = len(start.objective)
    self._is_within = start.part is not None

  def state(self) -> dict[str, Any]:
    """The attributes by name, on the host."""
    return {
      'labels': self._chunks.get(self._labels),
      'scores': self._chunks.get(self._scores),
      'drift': self.drift,
      'candidates': self._chunks.get(self._candidates),
      'searched': self.searched,
      'basis': self.basis,
      'width': self.width,
    }

  def begin(self, c_KD: jax.Array) -> bool:
    """Before a pass: whether it can be screened."""
    self._is_full = bool(np.isinf(self.drift).any())
    self._whole = candidates.make_whole(self._mesh, self._num_centers)(c_KD)
    if self._is_full:
      if not self._is_within:
        self._choose_width()
      self._scored = self._sample.scored(self._whole, self.basis)
    self._is_within = False
    return self.width > 0

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Adds a chunk of points to sums and counts, which are given up.

    The search does not wait for the chunks before, so that a CPU's cores can
    search several chunks at once.

    Returns:
      sums, counts, cosines [n] of the points, number of bad points.
    """
    if self._is_full:
      search = candidates.make_full_search(
        self._mesh, self._num_centers, self._score_dtype
      )
      label_n, score_n, self._candidates[chunk] = search(
        self._whole, self._scored, self.basis, x_nD, self._labels[chunk]
      )
    else:
      search = candidates.make_quick_search(self._mesh)
      moved = np.zeros(len(self._whole), bool)
      moved[: self._num_centers] = self.drift > 0
      label_n, score_n = search(
        self._whole,
        moved,
        x_nD,
        self._labels[chunk],
        self._scores[chunk],
        self._candidates[chunk],
      )
    self._labels[chunk], self._scores[chunk] = label_n, score_n
    accumulate = lloyd_programs.make_accumulate(self._mesh)
    return accumulate(sums, counts, x_nD, label_n, score_n)

  def finish(self, shift: np.ndarray) -> None:
    """After the update: what the next pass must look at.

    Args:
      shift: [K], how far each center moved; infinite if it was restarted.
    """
    if self._is_full:
      self.searched = self._iteration
    is_wrong = self._iteration > 0 and self._costs_too_much()
    if is_wrong and self._is_full:
      self.width = widths.following(self.width, len(self.basis))
    self._iteration += 1
    if is_wrong or self._iteration > _SERVE * self.searched:
      shift = np.full_like(shift, np.inf)
    self.drift = shift

  def _choose_width(self) -> None:
    if self._iteration > 1 and not self.width:
      return
    first = not self._iteration
    self.width, self.basis = self._sample.choose(
      self._whole,
      self._sample_labels(),
      rows=widths.FIRST_ROWS if first else widths.LATER_ROWS,
      # Means are told apart by less than the rows they start from.
      at_least=self.width if self._iteration > 1 else 0,
      max_loss=widths.MAX_FIRST_LOSS if first else widths.MAX_LOSS,
    )

  def _costs_too_much(self) -> bool:
    """Whether a sample's labels in this pass lack too much to the best."""
    loss, best = self._sample.loss(
      self._whole, self._sample_labels(), self._iteration
    )
    is_wrong = loss > widths.MAX_CHECKED_LOSS * best
    _log.info(
      'screening: %s, cosines of the sample %.1e low%s',
      f'{self.width} dimensions' if self._is_full else 'candidates',
      loss,
      '; more from here on' if is_wrong else '',
    )
    return is_wrong

  def _sample_labels(self) -> np.ndarray:
    return self._chunks.get(self._labels)[self._sample.rows]
