"""Assignment that looks only where a label can change, for CPUs.

After the first pass a point is compared with the centers that moved, and with
all of them only if its own score fell. That gives the labels of a plain pass.

Shapes: N points, K centers, D dimensions. Upper case is global, lower case this
device's part.
"""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import candidates
from mlcd_jax import lloyd_programs
from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import sharding

# Compared with this share of the centers or fewer, a pass looks only at those
# that moved. Few sizes, since each is a program.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_SIZE_MULTIPLE = 64


class Activity:
  """What the points' last labels say about where labels can change.

  Its state, by name:
    labels: int32 [N] of the last pass.
    scores: float32 [N], the points' scores then.
    drift: float32 [K], how far centers moved in the last update; infinite where
      points must be compared with them.
  """

  is_quick = False  # Passes start from zero sums and counts.

  def __init__(
    self,
    mesh: Mesh,
    num_centers: int,
    chunks: points.Points,
    *,
    mean: np.ndarray,
    score_dtype: jnp.dtype,
    known: Mapping[str, np.ndarray],
  ):
    """Starts without labels, or goes on.

    Args:
      mesh: of all devices.
      num_centers: K.
      chunks: of the points.
      mean: [D], taken off what is scored.
      score_dtype: of the products' operands.
      known: a state to go on from, or empty.
    """
    self._mesh = mesh
    self._num_centers = num_centers
    self._chunks = chunks
    self._mean = mean
    self._score_dtype = score_dtype
    nothing = np.zeros(0)
    self._labels = chunks.put(known.get('labels', nothing), np.int32)
    self._scores = chunks.put(known.get('scores', nothing), np.float32)
    unknown = np.full(num_centers, np.inf, np.float32)
    self._drift = known.get('drift', unknown)
    self._size = 0

  def state(self) -> dict[str, np.ndarray]:
    """What is known, on the host."""
    return {
      'labels': self._chunks.get(self._labels),
      'scores': self._chunks.get(self._scores),
      'drift': self._drift,
    }

  def begin(self, c_KD: jax.Array) -> bool:
    """Before a pass: whether `add` serves it, not a plain one."""
    self._size = self._choose_size()
    if self._size:
      moved = np.zeros(self._padded_centers(), bool)
      moved[: self._num_centers] = self._drift > 0
      prepare = _make_prepare(self._mesh, self._num_centers, self._score_dtype)
      self._centers = prepare(c_KD, self._mean), moved
    return self._size > 0

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Adds a chunk of points to sums and counts, which are given up.

    The search does not wait for the chunks before, so that a CPU's cores can
    search several chunks at once.

    Returns:
      sums, counts, cosines [n] of the points, number of bad points.
    """
    search = _make_search(
      self._mesh, self._num_centers, self._size, self._score_dtype
    )
    label_n, score_n, cosine_n = search(
      *self._centers, x_nD, self._mean, self._labels[chunk], self._scores[chunk]
    )
    self.keep(chunk, label_n, score_n)
    accumulate = lloyd_programs.make_accumulate(self._mesh)
    return accumulate(sums, counts, x_nD, label_n, cosine_n)

  def keep(self, chunk: int, label_n: jax.Array, score_n: jax.Array) -> None:
    """Takes a chunk's labels and scores from a plain pass."""
    self._labels[chunk], self._scores[chunk] = label_n, score_n

  def finish(self, shift: np.ndarray, c_KD: jax.Array) -> None:
    """After the update: what the next pass must look at.

    Args:
      shift: [K], how far each center moved; infinite if it was restarted.
      c_KD: the new centers.
    """
    del c_KD
    self._drift = shift

  def _choose_size(self) -> int:
    """Centers that this pass looks at, padding included; 0 = a plain pass."""
    padded = self._padded_centers()
    moved = int((self._drift > 0).sum())
    for share in _SHARES:
      size = nearest.up(int(share * padded), _SIZE_MULTIPLE)
      if moved <= size < padded:
        return size
    return 0

  def _padded_centers(self) -> int:
    return nearest.padded_centers(self._num_centers, self._mesh)


@functools.cache
def _make_prepare(mesh, num_centers, score_dtype):
  """Centers, mean -> all centers as they are scored, on every device."""
  whole = candidates.make_whole(mesh, num_centers)
  return jax.jit(
    lambda c_KD, mean_D: (whole(c_KD) - mean_D[None]).astype(score_dtype)
  )


@functools.cache
def _make_search(mesh, num_centers, size, score_dtype):
  """A chunk -> labels, scores, cosines."""

  def search(cs_KD, moved_K, x_nD, mean_D, label_n, score_n):
    label_n, score_n = _look(
      cs_KD,
      moved_K,
      x_nD.astype(score_dtype),
      label_n,
      score_n,
      size=size,
      tile=nearest.tile_shape(mesh, num_centers),
    )
    return label_n, score_n, score_n + x_nD @ mean_D

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return jax.jit(
    jax.shard_map(
      search,
      mesh=mesh,
      in_specs=(all_, all_, rows, all_, rows, rows),
      out_specs=(rows, rows, rows),
      check_vma=False,
    )
  )


def _look(cs_KD, moved_K, xs_nD, label_n, score_n, *, size, tile):
  """Labels and scores of a plain pass, from those of the pass before."""
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


def _moved_first(moved_K, size):
  """Numbers of the centers that moved, then others; and how many moved."""
  ids = jnp.argsort(~moved_K, stable=True).astype(jnp.int32)
  return ids[:size], jnp.sum(moved_K)
