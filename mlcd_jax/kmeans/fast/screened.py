"""Screened assignment: by a few candidates of each point, for CPUs.

The first pass searches fully, on leading dimensions, and finds every point's
candidates. The passes after it are quick: they look at these alone, search
anew for the points whose candidates have grown old, and move the points whose
label changed from one sum to another. A sample says how old is too old. When
most points are, or a center was restarted, a pass searches fully again.
Programs are in candidates.py, the choice of the dimensions in widths.py.

Shapes: N points, K centers, D dimensions, P leading dimensions, C candidates of
a point.
"""

import logging
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import candidates
from mlcd_jax import lloyd_programs
from mlcd_jax import points
from mlcd_jax import widths

_log = logging.getLogger(__name__)

# The share of points to be searched anew above which all are: then fewer
# dimensions may do.
_MOST_OLD = 0.5

# Type, shape and padding of what is found of a point.
_KINDS = {
  'label_n': (np.int32,),
  'score_n': (np.float32, (), np.inf),
  'lead_n': (np.float32,),
  'floor_n': (np.float32,),
  'ids_nC': (np.int32, (candidates.COUNT,)),
}


class Screening:
  """What is known of the points between passes.

  Its state, by name:
    label_n, score_n, lead_n, floor_n, ids_nC: what the last search found of
      the points, [N] or [N, C], see candidates.Found; the scores of points that
      are left out are infinite.
    drift: float32 [K], how far centers moved in the last update; infinite if
      the next pass searches fully.
    reach: how much nearer a center can have come to a point, in all updates
      together.
    basis: float32 [D, P], the leading dimensions of the first centers.
    width: how many of them are scored; 0 if all dimensions are needed.
  """

  def __init__(
    self,
    mesh: Mesh,
    sample: widths.Sample,
    chunks: points.Points,
    *,
    start: Any,
  ):
    """Starts, or goes on.

    Args:
      mesh: of all devices.
      sample: of the points.
      chunks: of the points.
      start: what was done; of a run that was screened, or that begins.
    """
    self._mesh = mesh
    self._num_centers = sample.num_centers
    self._chunks = chunks
    self._sample = sample
    known = start.known
    nothing = np.zeros(0)
    self._found = [
      candidates.Found(*chunk)
      for chunk in zip(
        *(
          chunks.put(known.get(name, nothing), *_KINDS[name])
          for name in candidates.Found._fields
        )
      )
    ]
    unknown = np.full(self._num_centers, np.inf, np.float32)
    self._drift = known.get('drift', unknown)
    self._reach = float(known.get('reach', 0))
    self._basis = known.get('basis')
    self._width = int(known.get('width', 0))
    self._iteration = len(start.objective)

  def state(self) -> dict[str, np.ndarray]:
    """What is known, on the host."""
    found = dict(zip(candidates.Found._fields, zip(*self._found)))
    return {
      **{name: self._chunks.get(parts) for name, parts in found.items()},
      'drift': self._drift,
      'reach': np.asarray(self._reach),
      **({} if self._basis is None else {'basis': self._basis}),
      'width': np.asarray(self._width),
    }

  @property
  def is_quick(self) -> bool:
    """Whether the next pass starts from the sums and counts of the last."""
    return bool(np.isfinite(self._drift).all())

  def begin(self, c_KD: jax.Array) -> bool:
    """Before a pass: whether `add` serves it, which it does."""
    whole = candidates.make_whole(self._mesh, self._num_centers)(c_KD)
    if self._basis is None:
      self._basis = self._sample.leading(whole)
    if not self.is_quick:
      self._width = self._sample.choose(
        whole, self._basis, self._sampled().label_n
      )
    basis = self._basis[:, : self._width] if self._width else None
    self._among = candidates.Search(
      whole, self._sample.scored(whole, basis), basis, self._reach
    )
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
    search = candidates.make_full_search(self._mesh, self._num_centers)
    found = search(self._among, x_nD, self._found[chunk].label_n)
    accumulate = lloyd_programs.make_accumulate(self._mesh)
    sums, counts, score_n, num_bad = accumulate(
      sums, counts, x_nD, found.label_n, found.score_n
    )
    self._found[chunk] = found._replace(score_n=score_n)
    return sums, counts, score_n, num_bad

  def _add_quick(self, sums, counts, chunk, x_nD):
    search = candidates.make_quick_search(self._mesh, self._num_centers)
    before = self._found[chunk]
    found = search(self._among, self._drift, x_nD, before)
    move = lloyd_programs.make_move(self._mesh)
    sums, counts = move(sums, counts, x_nD, before.label_n, found.label_n)
    self._found[chunk] = found
    return sums, counts, found.score_n, 0

  def finish(self, shift: np.ndarray, c_KD: jax.Array) -> None:
    """After the update: what the next pass must look at.

    Args:
      shift: [K], how far each center moved; infinite if it was restarted.
      c_KD: the new centers.
    """
    self._iteration += 1
    sampled, before = self._sampled(), self._among
    if self.is_quick:
      self._reach = self._sample.check(before, sampled, self._iteration)
    self._drift = shift
    if not self.is_quick:
      return
    whole = candidates.make_whole(self._mesh, self._num_centers)(c_KD)
    rise, old = self._sample.age(
      before, whole, sampled, is_first=self._iteration == 1
    )
    self._reach += rise
    _log.info('screening: %.1f %% of the points have old candidates', 100 * old)
    if old > _MOST_OLD:
      self._drift = np.full_like(shift, np.inf)

  def _sampled(self) -> candidates.Found:
    """What is found of the sample."""
    return candidates.Found(
      *(
        self._chunks.at(parts, self._sample.rows) for parts in zip(*self._found)
      )
    )
