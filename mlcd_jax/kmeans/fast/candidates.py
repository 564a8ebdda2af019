"""Finds labels among a few candidate centers of each row.

A full search scores all centers on a few leading dimensions. The best of them
become the row's candidates. These and the row's own center are then scored on
all dimensions.

A quick search compares a row only with its candidates, and only if one of them
may have overtaken its center: if they moved too far for the center's lead.

A row's candidates are stale once some other center could have overtaken its
best one: when the gap between its best score now and its last candidate's score
at the last full search is smaller than the most any center can have gained
since. Stale rows get a full search.

Shapes: n rows of a chunk, K centers, D dimensions, P leading dimensions, T rows
a tile, B buckets of centers, C candidates of a row, M = C + 1 with its own
center. Upper case is global, lower case this device's part.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import sharding
from mlcd_jax.kmeans import passes
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# Candidates of a row. 24 or 48, of which 12 are kept, find the same labels on
# fewer dimensions, but what they save the rescoring takes.
COUNT = 12

# Candidates come from the best two centers of each of these buckets: 64 to
# choose 12 from.
_NUM_BUCKETS = 32
# Parts of a bucket's tile, of which each gives at most one candidate.
_BUCKET_PARTS = 8

# The most that a lead shrinks, as a share of how far its two centers moved. By
# the triangle inequality it is 1. Of 8,192 rows of four data sets 99 % stayed
# below 0.3 and 99.9 % below 0.45; what 0.3 misses cost at most 5e-7 of the
# objective a pass.
_LEAD_SHARE = 0.3

# Centers of a tile of scores, and its scores, which take 1 MiB and so stay in
# the cache.
_TILE_CENTERS = 4_096
_TILE_SCORES = 2**18


@functools.cache
def make_gather(mesh: Mesh, num_centers: int) -> Callable:
  """Makes: centers -> float32 [K, D] on every device.

  Copies of the first center are in the place of padding.
  """
  return passes.on_mesh(
    lambda c_kD: lax.all_gather(
      search.real_centers(c_kD, num_centers), 'fsdp', tiled=True
    ),
    mesh,
    sharding.CENTERS,
    sharding.REPLICATED,
  )


class Centers(NamedTuple):
  """The centers as a search needs them.

  Attributes:
    c_KD: all of them.
    scored_KP: what is scored of them; its type is that of the products.
    basis_DP: the leading dimensions, or None where all are scored.
    reach: the most that any center can have gained on a row since the first
      pass, a cosine.
  """

  c_KD: jax.Array
  scored_KP: jax.Array
  basis_DP: jax.Array | None
  reach: float


class Labels(NamedTuple):
  """What a search returns for each row.

  Attributes:
    label_n: the row's center.
    score_n: its cosine to it.
    lead_n: how far this is above all candidates' cosines.
    floor_n: the last candidate's cosine at the last full search, minus the
      reach then.
    ids_nC: the candidates.
  """

  label_n: jax.Array
  score_n: jax.Array
  lead_n: jax.Array
  floor_n: jax.Array
  ids_nC: jax.Array


@functools.cache
def make_full_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes: Centers, rows [n, D], their labels -> Labels, by all centers."""

  def full(centers, x_nD, label_n):
    return _search_fully(centers, x_nD, label_n, num_centers)

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return passes.on_mesh(full, mesh, (all_, rows, rows), rows)


@functools.cache
def make_quick_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the search among each row's candidates.

  The program takes Centers, how far they moved [K], rows [n, D] and the Labels
  of the last search, and returns Labels. Rows that it need not look at keep
  their cosine.
  """

  def quick(centers, drift_K, x_nD, labels):
    moved_n = drift_K[labels.label_n] + jnp.max(drift_K[labels.ids_nC], axis=1)
    labels = labels._replace(lead_n=labels.lead_n - _LEAD_SHARE * moved_n)
    usable_n = jnp.isfinite(labels.score_n)

    def compare_again(rows, old):
      ids_TC = labels.ids_nC[rows]
      return best_candidate(x_nD[rows], centers.c_KD, old[0], ids_TC)

    due_n = usable_n & (labels.lead_n <= 0)
    compared = search.redo(
      compare_again, due_n, labels[:3], search.COMPARED_ROWS
    )
    labels = Labels(*compared, *labels[3:])

    def search_again(rows, old):
      return tuple(_search_fully(centers, x_nD[rows], old[0], num_centers))

    stale_n = usable_n & (labels.score_n < labels.floor_n + centers.reach)
    return Labels(
      *search.redo(search_again, stale_n, tuple(labels), search.COMPARED_ROWS)
    )

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return passes.on_mesh(quick, mesh, (all_, all_, rows, rows), rows)


def _search_fully(centers: Centers, x_nD, label_n, num_centers) -> Labels:
  c_KD, scored_KP, basis_DP, reach = centers
  xs_nP = x_nD if basis_DP is None else x_nD @ basis_DP
  ids_nC = seek(scored_KP, xs_nP.astype(scored_KP.dtype), num_centers)
  label_n, score_n, lead_n, last_n = compare(x_nD, c_KD, label_n, ids_nC)
  return Labels(label_n, score_n, lead_n, last_n - reach, ids_nC)


def seek(scored_KP: jax.Array, xs_nP: jax.Array, num_centers: int) -> jax.Array:
  """Returns the numbers [n, C] of each row's candidates."""
  rows = min(256, _TILE_SCORES // min(len(scored_KP), _TILE_CENTERS))
  rows = min(1 << (rows.bit_length() - 1), len(xs_nP))

  def tile(xs_TP):
    return _best_of_buckets(scored_KP, xs_TP, num_centers)

  return search.map_tiles(tile, rows, xs_nP)


def compare(
  x_nD: jax.Array, c_KD: jax.Array, label_n: jax.Array, ids_nC: jax.Array
) -> tuple[jax.Array, ...]:
  """Returns `best_candidate` of all rows, and the last candidate's cosine."""

  def tile(x_TD, label_T, ids_TC):
    ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
    s_TM = search.cosines(x_TD, c_KD, ids_TM)
    return *_best(ids_TM, s_TM), jnp.min(s_TM[:, 1:], axis=1)

  return search.map_tiles(tile, search.COMPARED_ROWS, x_nD, label_n, ids_nC)


def _best_of_buckets(scored_KP, xs_TP, num_centers):
  """Returns the best centers [T, C] among the best two of each bucket."""
  # A center's row number is put into the low bits of its score: one maximum
  # finds both. Those bits mean less than the dimensions that are left out.
  num_rows = len(scored_KP) // _NUM_BUCKETS
  tile_rows = tiles.largest_divisor(num_rows, _TILE_CENTERS // _NUM_BUCKETS)
  mask = (1 << (num_rows - 1).bit_length()) - 1

  def best_two(best, part):
    first_row, c_tP = part
    s_tT = search.scores(c_tP, xs_TP)
    s_RBT = s_tT.reshape(tile_rows, _NUM_BUCKETS, -1)
    row_RBT = first_row + lax.broadcasted_iota(jnp.int32, s_RBT.shape, 0)
    key_RBT = lax.bitcast_convert_type(s_RBT, jnp.int32) & ~mask | row_RBT
    key_RBT = lax.bitcast_convert_type(key_RBT, jnp.float32)
    # Each part gives only its best: a second one in it is missed, which is
    # rare and saves a reduction.
    parts = key_RBT.reshape(
      tiles.largest_divisor(tile_rows, _BUCKET_PARTS), -1, *key_RBT.shape[1:]
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
      scored_KP.reshape(-1, tile_rows * _NUM_BUCKETS, scored_KP.shape[1]),
    ),
  )
  key_XT = jnp.concatenate(best)
  ids = []
  for _ in range(COUNT):
    key_T, place_T = search.first_max(key_XT)
    row_T = lax.bitcast_convert_type(key_T, jnp.int32) & mask
    ids.append(row_T * _NUM_BUCKETS + place_T % _NUM_BUCKETS)
    place_XT = lax.broadcasted_iota(jnp.int32, key_XT.shape, 0)
    key_XT = jnp.where(place_XT == place_T[None], -jnp.inf, key_XT)
  ids_TC = jnp.stack(ids, axis=1)
  return jnp.where(ids_TC < num_centers, ids_TC, 0)  # Padding copies center 0.


def best_candidate(
  x_TD: jax.Array, c_KD: jax.Array, label_T: jax.Array, ids_TC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Compares each row's label and candidates.

  Returns:
    Number of the best [T], its cosine, and its lead over the next, float32.
  """
  ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
  return _best(ids_TM, search.cosines(x_TD, c_KD, ids_TM))


def _best(ids_TM, s_TM):
  best_T, place_T = search.first_max(s_TM.T)
  ids_T = jnp.take_along_axis(ids_TM, place_T[:, None], axis=1)[:, 0]
  others_TM = jnp.where(ids_TM == ids_T[:, None], -jnp.inf, s_TM)
  return ids_T, best_T, best_T - jnp.max(others_TM, axis=1)
