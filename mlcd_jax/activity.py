"""Assignment that looks only where a label can change, for CPUs.

After the first pass a point is compared with the centers that moved, and with
all of them only if its own score fell. Without screening that gives the labels
of a plain pass. With it, centers are scored on a few leading dimensions, and
only the best candidates and the point's own center on all of them.

Shapes: N points, K centers, D dimensions, P leading dimensions, T points a
tile, S sampled points. Upper case is global, lower case this device's part.
"""

from collections.abc import Sequence
import functools
import logging
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import lloyd_programs
from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import screening
from mlcd_jax import sharding

_log = logging.getLogger(__name__)

# A screened pass passes over centers that moved by less since they were last
# looked at, and points whose own score fell by less. The check of every pass
# sees what that costs too.
_SCREENED_DRIFT = 0.03
_SCREENED_FALL = 1e-3

# Compared with this share of the centers or fewer, a pass looks only at those
# that moved. Few sizes, since each is a program.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


class Activity:
  """What the points' last labels say about where labels can change.

  Attributes:
    labels: int32 [N] of the last pass.
    scores: float32 [N], the points' scores then.
    drift: float32 [K], how far centers moved since points were last compared
      with them; infinite where they must be.
    basis: float32 [D, P], the leading dimensions, if any are in use.
    width: dimensions that are scored; 0 = all.
  """

  def __init__(
    self,
    mesh: Mesh,
    num_centers: int,
    chunks: points.Points,
    *,
    sample: screening.Sample,
    score_dtype: jnp.dtype,
    screens: bool,
  ):
    """Starts without labels.

    Args:
      mesh: of all devices.
      num_centers: K.
      chunks: of the points.
      sample: of the points.
      score_dtype: of the operands over all dimensions.
      screens: score on leading dimensions where the sample allows it.
    """
    self._mesh = mesh
    self._num_centers = num_centers
    self._chunks = chunks
    self._score_dtype = score_dtype
    self._sample = sample
    num_points = chunks.rows_of(len(chunks) - 1)[1]
    self._labels = self._on_devices(np.zeros(num_points, np.int32))
    self._scores = self._on_devices(np.zeros(num_points, np.float32))
    self._leading = {}
    self.drift = np.full(num_centers, np.inf, np.float32)
    self.basis = np.zeros((0, 0), np.float32)
    self.width = 0
    self._iteration = 0
    self._size = 0
    self._is_wrong = False
    # A width is chosen before a pass that must look at every center anew, but
    # not again within that pass.
    self._screens = self._chooses = screens

  @property
  def labels(self) -> np.ndarray:
    """int32 [N]."""
    return self._on_host(self._labels)

  @property
  def scores(self) -> np.ndarray:
    """float32 [N]."""
    return self._on_host(self._scores)

  def state(self) -> dict[str, Any]:
    """The attributes by name, to go on from."""
    names = ('labels', 'scores', 'drift', 'basis', 'width')
    return {name: getattr(self, name) for name in names}

  def restore(self, state: Any) -> None:
    """Goes on from an object with these attributes and its objective."""
    if len(state.labels):
      self._labels = self._on_devices(state.labels)
      self._scores = self._on_devices(state.scores)
      self.drift, self.basis = state.drift, state.basis
      self.width = state.width
      self._iteration = len(state.objective)
      self._chooses = self._screens and state.part is None

  def begin(self, c_KD: jax.Array) -> bool:
    """Before a pass: whether `add` serves it, not a plain one."""
    if self._chooses and np.isinf(self.drift).all():
      self._choose_width(c_KD)
    self._chooses = self._screens
    self._size = self._choose_size()
    if self._size:
      prepare = screening.make_prepare(
        self._mesh, self._num_centers, self.width, self._score_dtype
      )
      mean = self._sample.mean
      basis = self.basis if self.width else mean[:, None]
      moved = np.pad(
        self._moved(), (0, self._padded_centers() - self._num_centers)
      )
      self._centers = *prepare(c_KD, mean, basis), moved
    return self._size > 0

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Adds a chunk of points to sums and counts, which are given up.

    The search does not wait for the chunks before, so that a CPU's cores can
    search several chunks at once.

    Returns:
      sums, counts, cosines [n] of the points, number of bad points.
    """
    search = _make_search(
      self._mesh, self._num_centers, self._size, self.width, self._score_dtype
    )
    label_n, score_n, cosine_n = search(
      *self._centers,
      x_nD,
      self._leading_of(chunk, x_nD),
      self._sample.mean,
      self._labels[chunk],
      self._scores[chunk],
    )
    self.keep(chunk, label_n, score_n)
    accumulate = lloyd_programs.make_accumulate(self._mesh)
    return accumulate(sums, counts, x_nD, label_n, cosine_n)

  def keep(self, chunk: int, label_n: jax.Array, score_n: jax.Array) -> None:
    """Takes a chunk's labels and scores from a plain pass."""
    self._labels[chunk], self._scores[chunk] = label_n, score_n

  def check(self, c_KD: jax.Array) -> None:
    """Before the update: what screening cost a sample, in this pass."""
    if not self.width or not self._size:
      return
    loss, best = self._sample.loss(c_KD, self._sample_labels(), self._iteration)
    wider = self._iteration > 0 and loss > screening.MAX_CHECKED_LOSS * best
    _log.info(
      'screening: %d dimensions, cosines of the sample %.1e low%s',
      self.width,
      loss,
      '; more from here on' if wider else '',
    )
    self._is_wrong = wider

  def finish(self, shift: np.ndarray) -> None:
    """After the update: what the next pass must look at.

    Args:
      shift: [K], how far each center moved.
    """
    looked = self._moved() if self._looks_at_few() else True
    self.drift = np.where(looked, 0, self.drift) + shift
    if self._is_wrong or (self._screens and not self._iteration):
      self.drift[:] = np.inf
    self._is_wrong = False
    self._iteration += 1

  def _choose_width(self, c_KD: jax.Array) -> None:
    first = not self._iteration
    self.width, self.basis = self._sample.choose(
      c_KD,
      self._sample_labels(),
      rows=screening.FIRST_ROWS if first else screening.LATER_ROWS,
      # Means are told apart by less than the rows they start from.
      wider_than=self.width if self._iteration > 1 else 0,
      max_loss=screening.MAX_FIRST_LOSS if first else screening.MAX_LOSS,
    )
    self._leading = {}

  def _choose_size(self) -> int:
    """Centers that this pass looks at, padding included; 0 = a plain pass."""
    padded = self._padded_centers()
    moved = int(self._moved().sum())
    for share in _SHARES:
      size = nearest.up(int(share * padded), screening.NUM_BUCKETS)
      if moved <= size < padded:
        return size
    return padded if self.width > 0 else 0

  def _looks_at_few(self) -> bool:
    return 0 < self._size < self._padded_centers()

  def _moved(self) -> np.ndarray:
    """Whether a pass must look at each center, bool [K]."""
    return self.drift > (_SCREENED_DRIFT if self.width else 0)

  def _padded_centers(self) -> int:
    return nearest.padded_centers(self._num_centers, self._mesh)

  def _leading_of(self, chunk: int, x_nD: jax.Array) -> jax.Array:
    """The chunk on its leading dimensions; kept as long as the chunk is."""
    if not self.width:
      return x_nD
    if chunk in self._leading:
      return self._leading[chunk]
    program = screening.make_project(self._mesh, self._score_dtype)
    xs_nP = program(x_nD, self.basis)
    if self._chunks.held:
      self._leading[chunk] = xs_nP
    return xs_nP

  def _sample_labels(self) -> np.ndarray:
    return self.labels[self._sample.rows]

  def _on_host(self, parts: Sequence[jax.Array]) -> np.ndarray:
    whole = np.concatenate([nearest.to_host(part) for part in parts])
    return whole[: self._chunks.rows_of(len(parts) - 1)[1]]

  def _on_devices(self, values: np.ndarray) -> list[jax.Array]:
    found = []
    for i in range(len(self._chunks)):
      start, stop = self._chunks.rows_of(i)
      padded = np.zeros(self._chunks.chunk, values.dtype)
      padded[: stop - start] = values[start:stop]
      found.append(
        jax.make_array_from_callback(
          padded.shape,
          NamedSharding(self._mesh, sharding.POINTS),
          lambda index, padded=padded: padded[index],
        )
      )
    return found


@functools.cache
def _make_search(mesh, num_centers, size, width, score_dtype):
  """A chunk -> labels, scores, cosines."""
  look = _look_screened if width else _look_exactly

  def search(
    c_KD, cs_KP, moved_K, x_nD, xs_nP, mean_D, label_n, score_n
  ):  # fmt: skip
    label_n, score_n = look(
      c_KD,
      cs_KP,
      moved_K,
      x_nD,
      xs_nP if width else xs_nP.astype(score_dtype),
      label_n,
      score_n,
      size=size,
      tile=nearest.tile_shape(mesh, num_centers),
    )
    return label_n, score_n, score_n if width else score_n + x_nD @ mean_D

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return jax.jit(
    jax.shard_map(
      search,
      mesh=mesh,
      in_specs=(all_, all_, all_, rows, rows, all_, rows, rows),
      out_specs=(rows, rows, rows),
      check_vma=False,
    )
  )


def _look_exactly(
  c_KD, cs_KD, moved_K, x_nD, xs_nD, label_n, score_n, *, size, tile
):
  """Labels and scores of a plain pass, from those of the pass before."""
  del c_KD, x_nD
  ids, num_moved = _moved_first(moved_K, size)
  # Copies of the first in the place of those that did not move.
  ids = jnp.where(jnp.arange(size) < num_moved, ids, ids[0])
  tile_rows, tile_centers = tile
  best_n, place_n = nearest.best_center(
    cs_KD[ids], xs_nD, tile=(tile_rows, nearest.divisor(size, tile_centers))
  )
  new_n = ids[place_n]
  own_moved_n = moved_K[label_n]
  better_n = (best_n > score_n) | ((best_n == score_n) & (new_n < label_n))
  # Centers that stayed have at most the old score: what exceeds it is best.
  fell_n = own_moved_n & (best_n <= score_n)
  take_n = own_moved_n | better_n
  label_n = jnp.where(take_n, new_n, label_n)
  score_n = jnp.where(take_n, best_n, score_n)

  def everywhere(rows, found):
    del found
    return nearest.best_center(cs_KD, xs_nD[rows], tile=tile)

  score_n, label_n = nearest.redo(
    everywhere, fell_n, (score_n, label_n), tile_rows
  )
  return label_n, score_n


def _look_screened(
  c_KD, cs_KP, moved_K, x_nD, xs_nP, label_n, score_n, *, size, tile
):
  """Labels and cosines by the leading dimensions, of the best by all."""
  del tile
  num_rows = x_nD.shape[0]
  tile_rows = screening.tile_rows(len(cs_KP))

  def everywhere(rows, found):
    count = screening.num_candidates(len(cs_KP))
    candidates = screening.candidates(cs_KP, xs_nP[rows], count)
    return screening.rescore(x_nD[rows], c_KD, [found[1], *candidates])[:2]

  if size == len(cs_KP):
    starts = jnp.arange(0, num_rows, tile_rows)
    score_n, label_n = lax.map(
      lambda start: everywhere(
        start + jnp.arange(tile_rows),
        (None, lax.dynamic_slice_in_dim(label_n, start, tile_rows)),
      ),
      starts,
    )
    return label_n.reshape(-1), score_n.reshape(-1)
  ids, _ = _moved_first(moved_K, size)
  few_PS = cs_KP[ids]
  few_rows = screening.tile_rows(size)

  def among_moved(part):
    x_TD, xs_TP, label_T, score_T = part
    candidates = screening.candidates(few_PS, xs_TP, screening.NUM_MOVED)
    score, label, own = screening.rescore(
      x_TD, c_KD, [label_T, *(ids[place] for place in candidates)]
    )
    return score, label, own < score_T - _SCREENED_FALL

  parts = (x_nD, xs_nP, label_n, score_n)
  score_n, label_n, fell_n = (
    found.reshape(-1)
    for found in lax.map(
      among_moved,
      tuple(a.reshape(-1, few_rows, *a.shape[1:]) for a in parts),
    )
  )
  score_n, label_n = nearest.redo(
    everywhere, fell_n, (score_n, label_n), tile_rows
  )
  return label_n, score_n


def _moved_first(moved_K, size):
  """Numbers of the centers that moved, then others; and how many moved."""
  ids = jnp.argsort(~moved_K, stable=True).astype(jnp.int32)
  return ids[:size], jnp.sum(moved_K)
