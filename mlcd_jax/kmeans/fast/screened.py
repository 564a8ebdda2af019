"""Screened assignment: approximate passes that are fast on CPUs.

There are two kinds of passes.

A full pass scores each row against all centers, on a few leading dimensions,
and keeps the best centers as the row's candidates. It adds all rows to new
sums. The first pass is full. Later ones are if a center was restarted, since it
is nobody's candidate, or if most rows have stale candidates.

A quick pass compares rows with their candidates only, except for rows with
stale candidates, which get a full search. It starts from the sums of the pass
before and moves the rows whose label changed.

After each pass a sample of the rows tells what the next one has to be. The
searches are in candidates.py, the measurements on the sample in dimensions.py.

Shapes: N rows, K centers, D dimensions, P leading dimensions, C candidates of a
row.
"""

from collections.abc import Mapping
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np

from mlcd_jax import sharding
from mlcd_jax.kmeans import chunks as chunks_lib
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import tiles
from mlcd_jax.kmeans.fast import candidates
from mlcd_jax.kmeans.fast import carried_sums
from mlcd_jax.kmeans.fast import dimensions

_log = logging.getLogger(__name__)

# With fewer rows, centers or dimensions a pass is too short to become faster by
# screening.
_MIN_ROWS = 2_048
_MIN_CENTERS = 512
_MIN_DIM = 256

# With more rows the candidates would take more than 2 GiB, at 4 bytes each.
_MAX_ROWS = 2**31 // (4 * candidates.COUNT)

# The fields of candidates.Labels as arguments of Chunks.put: type, shape of one
# row's value, value of padding rows.
_FIELDS = {
  'label_n': (np.int32,),
  'score_n': (np.float32, (), np.inf),
  'lead_n': (np.float32,),
  'floor_n': (np.float32,),
  'ids_nC': (np.int32, (candidates.COUNT,)),
}


def pays(num_rows: int, dim: int, num_centers: int) -> bool:
  """Returns whether screening makes the passes of a clustering faster.

  The answer is no for small clusterings, and for so many rows that their
  candidates would take too much memory.
  """
  return (
    _MIN_ROWS <= num_rows <= _MAX_ROWS
    and num_centers >= _MIN_CENTERS
    and dim >= _MIN_DIM
  )


class Screened:
  """An assigner that compares most rows with a few candidates only.

  `kmeans.assign.Assigner` describes its methods. Its state has these arrays:
    label_n, score_n, lead_n, floor_n, ids_nC: the fields of candidates.Labels
      for all rows, [N] or [N, C]. The scores of bad rows are infinite.
    drift: the distance that each center moved in the last update, float32 [K].
      It is infinite for restarted centers, and for all centers if too many rows
      have stale candidates. If any is infinite, the next pass is full.
    reach: how much the cosine of a row to a center is taken to have grown at
      most, in all updates together.
    basis: the leading dimensions of the first centers, float32 [D, P].
    width: the number of these that a full search scores; 0 if it scores all
      dimensions.
    sums, counts: the sums [K, D] and counts [K] of the last pass. They are
      there only if the next pass is quick.
  """

  name = 'screened'

  def __init__(
    self,
    chunks: chunks_lib.Chunks,
    sample: chunks_lib.Sample,
    num_centers: int,
    *,
    iteration: int = 0,
    state: Mapping[str, np.ndarray] | None = None,
    limits: dimensions.Limits | None = None,
  ):
    """Starts a clustering, or goes on from a saved state.

    Args:
      chunks: the rows.
      sample: the sample of the rows.
      num_centers: K.
      iteration: the number of iterations done before.
      state: the state to go on from; None or an empty one to start.
      limits: the limits of what screening may lose; Limits() by default.
    """
    state = state or {}
    self._mesh = chunks.mesh
    self._num_centers = num_centers
    self._chunks = chunks
    # The search of a chunk needs no sums of the chunk before, so each core can
    # search a chunk of its own. This is faster than one chunk on all cores.
    self.in_flight = min(8, os.cpu_count() or 1)
    self._tuner = dimensions.Tuner(
      sample,
      num_rows=chunks.rows.shape[0],
      num_centers=num_centers,
      score_dtype=jnp.dtype(tiles.score_dtype(chunks.mesh)),
      limits=limits or dimensions.Limits(),
    )
    nothing = np.zeros(0)
    self._labels = [
      candidates.Labels(*chunk)
      for chunk in zip(
        *(
          chunks.put(state.get(name, nothing), *_FIELDS[name])
          for name in candidates.Labels._fields
        )
      )
    ]
    # Without a state the drift is unknown, which makes the first pass full.
    unknown = np.full(num_centers, np.inf, np.float32)
    self._drift = state.get('drift', unknown)
    self._reach = float(state.get('reach', 0))
    self._basis = state.get('basis')
    self._width = int(state.get('width', 0))
    self._iteration = iteration
    self._sums = None
    if self.is_quick:
      self._sums = carried_sums.to_devices(
        state['sums'], state['counts'], self._mesh
      )

  @property
  def is_quick(self) -> bool:
    """Returns whether the current pass is quick; between passes, the next."""
    return bool(np.isfinite(self._drift).all())

  def state(self) -> dict[str, np.ndarray]:
    """Copies the arrays that the class lists to the host; see `Assigner`."""
    labels = dict(zip(candidates.Labels._fields, zip(*self._labels)))
    state = {name: self._chunks.get(parts) for name, parts in labels.items()}
    state |= {
      'drift': self._drift,
      'reach': np.asarray(self._reach),
      'width': np.asarray(self._width),
    }
    if self._basis is not None:
      state['basis'] = self._basis
    if self._sums:
      state['sums'], state['counts'] = carried_sums.to_host(
        *self._sums, self._num_centers
      )
    return state

  def begin(self, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prepares a pass; see `Assigner`."""
    c_KD = self._gather(centers)
    if self._basis is None:
      self._basis = self._tuner.leading_dimensions(c_KD)
    if not self.is_quick:
      self._width = self._tuner.choose_width(
        c_KD, self._basis, self._sampled().label_n
      )
    basis = self._basis[:, : self._width] if self._width else None
    self._centers = candidates.Centers(
      c_KD, self._tuner.scored(c_KD, basis), basis, self._reach
    )
    if not self.is_quick:
      return programs.make_zeros(self._mesh, *centers.shape)()
    sums, self._sums = self._sums, None  # The pass reuses their memory.
    return sums

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Assigns the rows of a chunk; see `Assigner`."""
    add = self._add_quick if self.is_quick else self._add_full
    return add(sums, counts, chunk, x_nD)

  def _add_full(self, sums, counts, chunk, x_nD):
    """Does `add` in a full pass."""
    search = candidates.make_full_search(self._mesh, self._num_centers)
    labels = search(self._centers, x_nD, self._labels[chunk].label_n)
    accumulate = programs.make_accumulate(self._mesh)
    sums, counts, score_n, num_bad = accumulate(
      sums, counts, x_nD, labels.label_n, labels.score_n
    )
    self._labels[chunk] = labels._replace(score_n=score_n)
    return sums, counts, score_n, num_bad

  def _add_quick(self, sums, counts, chunk, x_nD):
    """Does `add` in a quick pass."""
    search = candidates.make_quick_search(self._mesh, self._num_centers)
    before = self._labels[chunk]
    labels = search(self._centers, self._drift, x_nD, before)
    move = programs.make_move(self._mesh)
    sums, counts = move(sums, counts, x_nD, before.label_n, labels.label_n)
    self._labels[chunk] = labels
    return sums, counts, labels.score_n, 0  # The first pass counted bad rows.

  def finish(
    self,
    sums: jax.Array,
    counts: jax.Array,
    shift: jax.Array,
    restarted: np.ndarray,
    centers: jax.Array,
  ) -> None:
    """Measures the pass and decides whether the next one is full or quick."""
    self._iteration += 1
    sampled, before = self._sampled(), self._centers
    if self.is_quick:
      self._reach = self._tuner.check(before, sampled, self._iteration)
    self._drift = sharding.to_host(shift)[: self._num_centers].copy()
    # No row has a restarted center as a candidate, so the next pass is full.
    # From here on, is_quick is about the next pass.
    self._drift[restarted] = np.inf
    if not self.is_quick:
      return
    rise, stale = self._tuner.age(
      before, self._gather(centers), sampled, is_first=self._iteration == 1
    )
    self._reach += rise
    _log.debug(
      'screening: candidates of %.1f %% of rows are stale', 100 * stale
    )
    if stale > self._tuner.limits.stale_share:
      self._drift = np.full_like(self._drift, np.inf)
    else:
      self._sums = carried_sums.merge(sums, counts)

  def _gather(self, centers: jax.Array) -> jax.Array:
    """Copies all centers [K, D] to every device."""
    return candidates.make_gather(self._mesh, self._num_centers)(centers)

  def _sampled(self) -> candidates.Labels:
    """Returns the labels of the sample, on the host."""
    indices = self._tuner.sample.indices
    return candidates.Labels(
      *(self._chunks.at(parts, indices) for parts in zip(*self._labels))
    )
