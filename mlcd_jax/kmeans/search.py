"""The best center of every row, a tile of scores at a time.

These functions run inside a program on the mesh: rows are split over the mesh
axis "data", centers over "fsdp". Ties go to the center with the lower number.

Shapes: n rows, k centers, D dimensions, T rows and t centers of a tile, L
labels and M candidates of a row. Upper case is global, lower case this device's
part.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# Rows whose candidates are compared at a time: the centers of 64 rows with 12
# candidates of 768 dimensions take 2 MB, which stay in a CPU's cache.
COMPARED_ROWS = 64


def scores(c_tD: jax.Array, x_TD: jax.Array, precision=None) -> jax.Array:
  """Returns the products [t, T], accumulated in float32.

  Centers run down the rows, so that reducing over them is element-wise.
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
  # Two plain reductions: on CPUs argmax costs as much as the product.
  score = jnp.max(s_tT, axis=0)
  row = lax.broadcasted_iota(jnp.int32, s_tT.shape, 0)
  rows = s_tT.shape[0]
  return score, jnp.min(jnp.where(s_tT == score[None], row, rows), axis=0)


def real_centers(c_kD: jax.Array, num_centers: int) -> jax.Array:
  """Replaces padding by copies of the first center.

  A copy never wins: among equals the lower number is taken.
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
  """Finds the best of this device's centers for every row.

  Args:
    c_kD: centers. Padding counts as centers.
    x_nD: rows.
    tile: numbers of rows and of centers that are scored at once.
    precision: of the products.
    left_out_nL: places in `c_kD` that a row may not get; numbers that are no
      place are ignored.

  Returns:
    Best scores [n], and the first center that has each.
  """
  tile_rows, tile_centers = tile
  k, dim = c_kD.shape
  rows = (x_nD,) if left_out_nL is None else (x_nD, left_out_nL)

  def best_of_tile(start, c_tD):
    def best_of_rows(x_TD, left_out_TL=None):
      s_tT = scores(c_tD, x_TD, precision)
      if left_out_TL is not None:
        place_TL = left_out_TL - start
        # Negative numbers would count from the end.
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
  """Returns the best scores and centers [n, L] of all devices."""

  def gather(x):  # [n, fsdp * l], lower centers first.
    x = lax.all_gather(x, 'fsdp', axis=1)
    return x.reshape(x.shape[0], -1)

  best, place = lax.top_k(gather(score_nl), num_labels)
  return best, jnp.take_along_axis(gather(center_nl), place, axis=1)


def cosines(x_TD: jax.Array, c_KD: jax.Array, ids_TM: jax.Array) -> jax.Array:
  """Returns the float32 cosines [T, M] of rows to the centers numbered."""
  # The barrier keeps the gather out of the product, where it is twice as slow.
  c_TMD = lax.optimization_barrier(
    c_KD.at[ids_TM.reshape(-1)].get(mode='promise_in_bounds')
  ).reshape(*ids_TM.shape, -1)
  return jnp.einsum(
    'td,tmd->tm', x_TD, c_TMD, preferred_element_type=jnp.float32
  )


def tiled_cosines(
  x_nD: jax.Array, c_KD: jax.Array, ids_nM: jax.Array
) -> jax.Array:
  """Returns `cosines` [n, M], a tile of rows after the other."""

  def tile(x_TD, ids_TM):
    return cosines(x_TD, c_KD, ids_TM)

  return map_tiles(tile, min(COMPARED_ROWS, len(x_nD)), x_nD, ids_nM)


def map_tiles(function: Callable, tile_rows: int, *arrays: jax.Array) -> Any:
  """Applies a function to arrays [n, ...], so many rows at a time."""
  tiles = [a.reshape(-1, tile_rows, *a.shape[1:]) for a in arrays]
  results = lax.map(lambda tile: function(*tile), tiles)
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)


def redo(
  function: Callable,
  flag_n: jax.Array,
  results: tuple[jax.Array, ...],
  tile_rows: int,
) -> tuple[jax.Array, ...]:
  """Computes the results of the flagged rows anew, a tile of them at a time.

  Args:
    function: takes row numbers [T] and their part of `results`; returns new
      values of that part.
    flag_n: which rows.
    results: arrays [n, ...].
    tile_rows: T.

  Returns:
    `results`, with the new values.
  """

  def tile(rows, is_flagged, results):
    new = function(rows, tuple(a[rows] for a in results))
    place = jnp.where(is_flagged, rows, len(flag_n))
    return tuple(a.at[place].set(b, mode='drop') for a, b in zip(results, new))

  return for_flagged(tile, flag_n, results, tile_rows)


def for_flagged(
  body: Callable, flag_n: jax.Array, carry: Any, tile_rows: int
) -> Any:
  """Runs a loop over the flagged rows, a tile of them at a time.

  Args:
    body: takes row numbers [T], which of them are flagged (the last tile may
      hold others too), and the carry; returns the carry.
    flag_n: which rows.
    carry: arrays.
    tile_rows: T.
  """
  n = flag_n.shape[0]
  count = jnp.sum(flag_n)
  place_n = jnp.where(flag_n, jnp.cumsum(flag_n) - 1, n)
  row_n = jnp.arange(n, dtype=jnp.int32)
  flagged_n = jnp.zeros(n, jnp.int32).at[place_n].set(row_n, mode='drop')

  def tile(i, carry):
    rows = lax.dynamic_slice_in_dim(flagged_n, i * tile_rows, tile_rows)
    return body(rows, i * tile_rows + jnp.arange(tile_rows) < count, carry)

  return lax.fori_loop(0, (count + tile_rows - 1) // tile_rows, tile, carry)
