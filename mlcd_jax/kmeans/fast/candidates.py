"""Labels from a few candidate centers of each point, for CPUs.

A full search scores all centers on a few leading dimensions, and the best of
them, the point's candidates, and its own center on all dimensions. A quick
search looks at these alone, where one of them may have come to be the best:
where they moved too far for the best one's lead. Then it searches fully for the
points whose candidates are old: whose best one is nearer than the last one was
found by less than other centers can have come nearer since.

Shapes: N points, K centers, D dimensions, P leading dimensions, T points a
tile, B buckets of centers, C candidates of a point. Upper case is global, lower
case this device's part.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import nearest
from mlcd_jax import sharding

# Candidates are among the best two of each bucket of centers.
_NUM_BUCKETS = 32
_BUCKET_PARTS = 8
COUNT = 12

# The most that a lead shrinks, as a share of how far its two centers moved. By
# the triangle inequality it is 1; of 8,192 rows of four data sets 99 % stayed
# below 0.3 and 99.9 % below 0.45, and what is missed beyond 0.3 cost at most
# 5e-7 of the objective a pass.
_LEAD_SHARE = 0.3

# Centers of a tile of scores; its scores, which stay in the cache; and points
# that are compared with their candidates at a time.
_TILE_CENTERS = 4_096
_TILE_SCORES = 2**18
_COMPARED_ROWS = 64


@functools.cache
def make_whole(mesh: Mesh, num_centers: int) -> Callable:
  """Makes: centers -> float32 [K, D] on every device.

  Copies of the first center are in the place of padding.
  """
  return jax.jit(
    jax.shard_map(
      lambda c_kD: lax.all_gather(
        nearest.real_centers(c_kD, num_centers), 'fsdp', tiled=True
      ),
      mesh=mesh,
      in_specs=sharding.CENTERS,
      out_specs=sharding.REPLICATED,
      check_vma=False,
    )
  )


class Search(NamedTuple):
  """All that a search looks at but the points.

  Attributes:
    c_KD: whole centers.
    cs_KP: what is scored of them, which gives the scores their type.
    basis_DP: the leading dimensions, or None for all.
    reach: how much nearer a center can have come to a point since the first
      pass, a cosine.
  """

  c_KD: jax.Array
  cs_KP: jax.Array
  basis_DP: jax.Array | None
  reach: float


class Found(NamedTuple):
  """What a search finds of points.

  Attributes:
    label_n: their centers.
    score_n: cosines to these.
    lead_n: how far these are ahead of all candidates'.
    floor_n: cosines of the last candidates when they were found, less the reach
      then.
    ids_nC: candidates.
  """

  label_n: jax.Array
  score_n: jax.Array
  lead_n: jax.Array
  floor_n: jax.Array
  ids_nC: jax.Array


@functools.cache
def make_full_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the search among all centers.

  It takes a Search, points [n, D] and their labels, and returns a Found.
  """

  def search(among, x_nD, label_n):
    return _search_fully(among, x_nD, label_n, num_centers)

  points, all_ = sharding.POINTS, sharding.REPLICATED
  return jax.jit(
    jax.shard_map(
      search,
      mesh=mesh,
      in_specs=(all_, points, points),
      out_specs=points,
      check_vma=False,
    )
  )


@functools.cache
def make_quick_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the search among each point's candidates.

  It takes a Search, how far centers moved [K], points [n, D] and the Found of
  the last search, and returns a Found; of points that it did not look at, the
  cosine is the one from before.
  """

  def search(among, drift_K, x_nD, found):
    moved_n = drift_K[found.label_n] + jnp.max(drift_K[found.ids_nC], axis=1)
    found = found._replace(lead_n=found.lead_n - _LEAD_SHARE * moved_n)
    usable_n = jnp.isfinite(found.score_n)

    def again(rows, old):
      return best_candidate(x_nD[rows], among.c_KD, old[0], found.ids_nC[rows])

    due_n = usable_n & (found.lead_n <= 0)
    found = Found(
      *nearest.redo(again, due_n, found[:3], _COMPARED_ROWS), *found[3:]
    )

    def anew(rows, old):
      return tuple(_search_fully(among, x_nD[rows], old[0], num_centers))

    stale_n = usable_n & (found.score_n < found.floor_n + among.reach)
    return Found(*nearest.redo(anew, stale_n, tuple(found), _COMPARED_ROWS))

  points, all_ = sharding.POINTS, sharding.REPLICATED
  return jax.jit(
    jax.shard_map(
      search,
      mesh=mesh,
      in_specs=(all_, all_, points, points),
      out_specs=points,
      check_vma=False,
    )
  )


def _search_fully(among: Search, x_nD, label_n, num_centers) -> Found:
  c_KD, cs_KP, basis_DP, reach = among
  xs_nP = x_nD if basis_DP is None else x_nD @ basis_DP
  ids_nC = seek(cs_KP, xs_nP.astype(cs_KP.dtype), num_centers)
  label_n, score_n, lead_n, last_n = compare(x_nD, c_KD, label_n, ids_nC)
  return Found(label_n, score_n, lead_n, last_n - reach, ids_nC)


def seek(cs_KP: jax.Array, xs_nP: jax.Array, num_centers: int) -> jax.Array:
  """Numbers [n, C] of each point's candidates, in tiles of points."""
  rows = min(256, _TILE_SCORES // min(len(cs_KP), _TILE_CENTERS))
  rows = min(1 << (rows.bit_length() - 1), len(xs_nP))

  def tile(xs_TP):
    return _best_of_buckets(cs_KP, xs_TP, num_centers)

  return _in_tiles(tile, rows, xs_nP)


def compare(
  x_nD: jax.Array, c_KD: jax.Array, label_n: jax.Array, ids_nC: jax.Array
) -> tuple[jax.Array, ...]:
  """`best_candidate` of all points, and the last one's cosine."""

  def tile(x_TD, label_T, ids_TC):
    ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
    s_TM = cosines(x_TD, c_KD, ids_TM)
    return *_best(ids_TM, s_TM), jnp.min(s_TM[:, 1:], axis=1)

  return _in_tiles(tile, _COMPARED_ROWS, x_nD, label_n, ids_nC)


def _in_tiles(function: Callable, rows: int, *arrays: jax.Array):
  """A function of so many rows of arrays [n, ...] at a time."""
  tiles = [a.reshape(-1, rows, *a.shape[1:]) for a in arrays]
  found = lax.map(lambda tile: function(*tile), tiles)
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def _best_of_buckets(cs_KP, xs_TP, num_centers):
  """Numbers [T, C] of the best centers, among the best two of each bucket."""
  # The row rides in the score's low bits, which mean less than the dimensions
  # that are left out: one maximum finds both.
  num_rows = len(cs_KP) // _NUM_BUCKETS
  tile_rows = nearest.divisor(num_rows, _TILE_CENTERS // _NUM_BUCKETS)
  mask = (1 << (num_rows - 1).bit_length()) - 1

  def best_two(best, part):
    first_row, c_tP = part
    s_tT = nearest.products(c_tP, xs_TP)
    s_RBT = s_tT.reshape(tile_rows, _NUM_BUCKETS, -1)
    row_RBT = first_row + lax.broadcasted_iota(jnp.int32, s_RBT.shape, 0)
    key_RBT = lax.bitcast_convert_type(s_RBT, jnp.int32) & ~mask | row_RBT
    key_RBT = lax.bitcast_convert_type(key_RBT, jnp.float32)
    # The second of a bucket is not sought among the rows of the first's part.
    parts = key_RBT.reshape(
      nearest.divisor(tile_rows, _BUCKET_PARTS), -1, *key_RBT.shape[1:]
    )
    first_BT, second_BT = best
    for key_BT in jnp.max(parts, axis=1):
      second_BT = jnp.maximum(second_BT, jnp.minimum(first_BT, key_BT))
      first_BT = jnp.maximum(first_BT, key_BT)
    return (first_BT, second_BT), None

  nothing_BT = jnp.full((_NUM_BUCKETS, len(xs_TP)), -jnp.inf, jnp.float32)
  best, _ = lax.scan(
    best_two,
    (nothing_BT, nothing_BT),
    (
      jnp.arange(0, num_rows, tile_rows, dtype=jnp.int32),
      cs_KP.reshape(-1, tile_rows * _NUM_BUCKETS, cs_KP.shape[1]),
    ),
  )
  key_XT = jnp.concatenate(best)
  found = []
  for _ in range(COUNT):
    key_T, place_T = nearest.first_max(key_XT)
    row_T = lax.bitcast_convert_type(key_T, jnp.int32) & mask
    found.append(row_T * _NUM_BUCKETS + place_T % _NUM_BUCKETS)
    place_XT = lax.broadcasted_iota(jnp.int32, key_XT.shape, 0)
    key_XT = jnp.where(place_XT == place_T[None], -jnp.inf, key_XT)
  ids_TC = jnp.stack(found, axis=1)
  return jnp.where(ids_TC < num_centers, ids_TC, 0)  # Of which padding is.


def best_candidate(
  x_TD: jax.Array, c_KD: jax.Array, label_T: jax.Array, ids_TC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The best of the label and the candidates.

  Returns:
    Its number [T], its cosine, and its lead over the next, float32.
  """
  ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
  return _best(ids_TM, cosines(x_TD, c_KD, ids_TM))


def _best(ids_TM, s_TM):
  best_T, place_T = nearest.first_max(s_TM.T)
  ids_T = jnp.take_along_axis(ids_TM, place_T[:, None], axis=1)[:, 0]
  others_TM = jnp.where(ids_TM == ids_T[:, None], -jnp.inf, s_TM)
  return ids_T, best_T, best_T - jnp.max(others_TM, axis=1)


def cosines(x_TD: jax.Array, c_KD: jax.Array, ids_TM: jax.Array) -> jax.Array:
  """Float32 cosines [T, M] to the centers of these numbers."""
  # Fused into the products, the gather is twice as slow.
  c_TMD = lax.optimization_barrier(
    c_KD.at[ids_TM.reshape(-1)].get(mode='promise_in_bounds')
  ).reshape(*ids_TM.shape, -1)
  return jnp.einsum(
    'td,tmd->tm', x_TD, c_TMD, preferred_element_type=jnp.float32
  )


def tiled_cosines(
  x_nD: jax.Array, c_KD: jax.Array, ids_nM: jax.Array
) -> jax.Array:
  """`cosines` of many points, in tiles whose centers stay in the cache."""

  def tile(x_TD, ids_TM):
    return cosines(x_TD, c_KD, ids_TM)

  return _in_tiles(tile, min(_COMPARED_ROWS, len(x_nD)), x_nD, ids_nM)
