"""The search for the best center of each row, one tile of scores at a time.

The functions are called inside the programs that run on each device. Rows are
split over the mesh axis "data" and centers over "fsdp". Among centers with
equal scores the one with the lowest number wins.

Shapes: n rows, k centers, D dimensions, T rows and t centers of a tile, L
labels and M candidates of a row. Upper case is global, lower case this device's
part.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# The number of rows whose candidates are compared at a time. The candidates of
# 64 rows, 12 each with 768 dimensions, take 2 MB, which stay in a CPU's cache.
COMPARED_ROWS = 64


def scores(c_tD: jax.Array, x_TD: jax.Array, precision=None) -> jax.Array:
  """Returns the scores [t, T], which are products summed in float32.

  Centers are the first axis, so a maximum over them compares whole vectors of
  rows with each other and needs no maximum within a vector.
  """
  return lax.dot_general(
    c_tD,
    x_TD,
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def first_max(s_tT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest value of each column and its first row, both [T]."""
  # Two plain reductions, since on CPUs argmax costs as much as the product.
  score = jnp.max(s_tT, axis=0)
  row = lax.broadcasted_iota(jnp.int32, s_tT.shape, 0)
  rows = s_tT.shape[0]
  return score, jnp.min(jnp.where(s_tT == score[None], row, rows), axis=0)


def real_centers(c_kD: jax.Array, num_centers: int) -> jax.Array:
  """Replaces the padding of centers by copies of the first center.

  A copy never becomes the best center, since it ties with the first center,
  which has a lower number. So scores need no mask for padding.
  """
  k = c_kD.shape[0]
  shard = lax.axis_index('fsdp')
  first_D = lax.psum(jnp.where(shard == 0, c_kD[0], 0), 'fsdp')
  center = shard * k + lax.broadcasted_iota(jnp.int32, c_kD.shape, 0)
  return jnp.where(center < num_centers, c_kD, first_D[None])


def best_center(
  c_kD: jax.Array,
  x_nD: jax.Array,
  *,
  tile: tuple[int, int],
  precision: lax.Precision | None = None,
  left_out_nL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Finds the best of this device's centers for each row.

  Args:
    c_kD: this device's centers. Padding counts as centers; `real_centers` makes
      it harmless. k is a multiple of the centers of a tile.
    x_nD: the rows; n is a multiple of the rows of a tile.
    tile: how many rows and how many centers are scored at once.
    precision: the precision of the products.
    left_out_nL: for each row, places in `c_kD` that it may not get. Numbers
      that are no place in `c_kD` are ignored.

  Returns:
    The best score of each row [n], and the place of its center among this
    device's [n], the first of equals.
  """
  tile_rows, tile_centers = tile
  k, dim = c_kD.shape
  rows = (x_nD,) if left_out_nL is None else (x_nD, left_out_nL)

  def best_of_tile(start, c_tD):
    def best_of_rows(x_TD, left_out_TL=None):
      s_tT = scores(c_tD, x_TD, precision)
      if left_out_TL is not None:
        place_TL = left_out_TL - start
        # A negative index would count from the end; this one is dropped.
        place_TL = jnp.where(place_TL < 0, len(s_tT), place_TL)
        row_T1 = jnp.arange(len(x_TD), dtype=jnp.int32)[:, None]
        s_tT = s_tT.at[place_TL, row_T1].set(-jnp.inf, mode='drop')
      return first_max(s_tT)

    return map_tiles(best_of_rows, tile_rows, *rows)

  if k == tile_centers:
    return best_of_tile(0, c_kD)

  def merge_tile(best, start_and_tile):
    start, c_tD = start_and_tile
    score, place = best_of_tile(start, c_tD)
    # Not >=, since among equals the center of the earlier tile stays.
    better = score > best[0]
    return (
      jnp.where(better, score, best[0]),
      jnp.where(better, start + place, best[1]),
    ), None

  starts = jnp.arange(0, k, tile_centers, dtype=jnp.int32)
  nothing = (
    jnp.full(x_nD.shape[0], -jnp.inf, jnp.float32),
    jnp.zeros(x_nD.shape[0], jnp.int32),
  )
  tiles = c_kD.reshape(-1, tile_centers, dim)
  return lax.scan(merge_tile, nothing, (starts, tiles))[0]


def merge_devices(
  score_nl: jax.Array, center_nl: jax.Array, num_labels: int
) -> tuple[jax.Array, jax.Array]:
  """Merges the best centers that the devices found among their own.

  Args:
    score_nl: this device's best scores, the best first.
    center_nl: their centers, with numbers among all centers.
    num_labels: L.

  Returns:
    The best scores and centers of all devices, both [n, L], the best first.
  """

  def gather(x):  # [n, fsdp * l], lower centers first.
    x = lax.all_gather(x, 'fsdp', axis=1)
    return x.reshape(x.shape[0], -1)

  best, place = lax.top_k(gather(score_nl), num_labels)
  return best, jnp.take_along_axis(gather(center_nl), place, axis=1)


def cosines(x_TD: jax.Array, c_KD: jax.Array, ids_TM: jax.Array) -> jax.Array:
  """Returns the cosines of each row to its own candidates.

  Args:
    x_TD: unit rows.
    c_KD: all centers.
    ids_TM: the numbers of the candidates of each row.

  Returns:
    The cosines, float32 [T, M].
  """
  # Without the barrier XLA moves the gather into the product, where it is twice
  # as slow.
  c_TMD = lax.optimization_barrier(
    c_KD.at[ids_TM.reshape(-1)].get(mode='promise_in_bounds')
  ).reshape(*ids_TM.shape, -1)
  return jnp.einsum(
    'td,tmd->tm', x_TD, c_TMD, preferred_element_type=jnp.float32
  )


def tiled_cosines(
  x_nD: jax.Array, c_KD: jax.Array, ids_nM: jax.Array
) -> jax.Array:
  """Returns the same as `cosines`, computed for one tile of rows at a time."""

  def tile(x_TD, ids_TM):
    return cosines(x_TD, c_KD, ids_TM)

  return map_tiles(tile, min(COMPARED_ROWS, len(x_nD)), x_nD, ids_nM)


def map_tiles(function: Callable, tile_rows: int, *arrays: jax.Array) -> Any:
  """Applies a function to tiles of rows, one tile after the other.

  Args:
    function: the function; it takes a tile [T, ...] of each array and returns a
      tree of arrays [T, ...].
    tile_rows: T, a divisor of n.
    *arrays: arrays [n, ...].

  Returns:
    The tree of the results of all tiles, [n, ...].
  """
  tiles = [a.reshape(-1, tile_rows, *a.shape[1:]) for a in arrays]
  results = lax.map(lambda tile: function(*tile), tiles)
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)


def redo(
  function: Callable,
  flag_n: jax.Array,
  results: tuple[jax.Array, ...],
  tile_rows: int,
) -> tuple[jax.Array, ...]:
  """Computes the results of the flagged rows anew.

  The function is not called for the other rows, so a few flagged rows cost
  little time.

  Args:
    function: the function; it takes the numbers of some rows [T] and a tuple of
      their present results, and returns a tuple of their new results.
    flag_n: True for the flagged rows.
    results: arrays [n, ...].
    tile_rows: T, a divisor of n.

  Returns:
    `results` with the new values of the flagged rows.
  """

  def tile(rows, is_flagged, results):
    new = function(rows, tuple(a[rows] for a in results))
    # The place n is out of bounds, so rows that fill up the tile are dropped.
    place = jnp.where(is_flagged, rows, len(flag_n))
    return tuple(a.at[place].set(b, mode='drop') for a, b in zip(results, new))

  return for_flagged(tile, flag_n, results, tile_rows)


def for_flagged(
  body: Callable, flag_n: jax.Array, carry: Any, tile_rows: int
) -> Any:
  """Runs a loop over the flagged rows, one tile of them at a time.

  Args:
    body: the body of the loop. It takes the numbers of some rows [T], a mask
      [T] of those that are flagged, and the carry, and returns the new carry.
      Only the last tile has rows outside the mask, which fill it up.
    flag_n: True for the flagged rows.
    carry: a tree of arrays.
    tile_rows: T, a divisor of n.

  Returns:
    The carry after the last tile.
  """
  n = flag_n.shape[0]
  count = jnp.sum(flag_n)
  # Writes the numbers of the flagged rows one after the other into flagged_n.
  place_n = jnp.where(flag_n, jnp.cumsum(flag_n) - 1, n)
  row_n = jnp.arange(n, dtype=jnp.int32)
  flagged_n = jnp.zeros(n, jnp.int32).at[place_n].set(row_n, mode='drop')

  def tile(i, carry):
    rows = lax.dynamic_slice_in_dim(flagged_n, i * tile_rows, tile_rows)
    return body(rows, i * tile_rows + jnp.arange(tile_rows) < count, carry)

  return lax.fori_loop(0, (count + tile_rows - 1) // tile_rows, tile, carry)
