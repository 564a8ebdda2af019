"""The search for the best center of each row among a few candidates.

There are two searches, both approximate.

A full search scores a row against all centers, but only on the leading
dimensions: the few directions in which centers differ most. The C centers with
the best scores become the row's candidates. Then the row's own center (the one
of the pass before) and the candidates are compared by their cosines on all
dimensions, and the best of them becomes the row's new center.

A quick search compares a row with its own center and its candidates only, and
only if its center may have changed. Two quantities of a row decide that:

  The lead is the row's cosine to its own center minus the best cosine to
  another candidate. Each update of the centers can shrink it, the more the
  farther these centers move. While the lead stays positive, no candidate is
  taken to have overtaken the row's own center, and the row is left out.

  The floor says how good the other centers can be. At the row's last full
  search their cosines were below that of the worst candidate. With each update
  they can grow, by an amount that `dimensions.py` estimates; the reach is the
  sum of these amounts. Once the worst candidate's cosine then plus the growth
  since exceeds the row's cosine to its own center now, another center may be
  the best one. The candidates are then stale, and the row gets a full search.

Shapes: n rows of a chunk, K centers, D dimensions, P leading dimensions, T rows
of a tile, B buckets of centers, R centers of a bucket, C candidates of a row,
and M = C + 1 with the row's own center. Upper case is global, lower case this
device's part.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import sharding
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# C, the candidates of a row. Taking the best 24 or 48 and keeping 12 of them
# finds the same labels on fewer dimensions, but the buckets and the comparison
# on all dimensions then take the time that this saves (docs/clustering.md).
COUNT = 12

# Centers are dealt to this many buckets. The best two of each bucket, 64 in
# all, are those that the 12 candidates are chosen from. Two maxima per bucket
# cost less than a sort of all scores.
_NUM_BUCKETS = 32
# A tile of a bucket is cut into this many parts. Each part offers its best
# center only, which saves a reduction over all scores.
_BUCKET_PARTS = 8

# The most that a lead is taken to shrink, as a share of the distances that its
# two centers moved, added up. The triangle inequality allows a share of 1. Of
# 8,192 rows of four data sets 99 % stayed below 0.3 and 99.9 % below 0.45. What
# 0.3 misses cost at most 5e-7 of the objective in a pass.
_LEAD_SHARE = 0.3

# Centers of a score tile, and its number of scores. They take 1 MiB in float32
# and so stay in the cache.
_TILE_CENTERS = 4_096
_TILE_SCORES = 2**18


@functools.cache
def make_gather(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the program that copies all centers to every device.

  The program takes padded centers [K, D], sharded as sharding.CENTERS. It
  returns all of them on every device, with copies of the first center in place
  of the padding.
  """
  return programs.on_mesh(
    lambda c_kD: lax.all_gather(
      search.real_centers(c_kD, num_centers), 'fsdp', tiled=True
    ),
    mesh,
    sharding.CENTERS,
    sharding.REPLICATED,
  )


class Centers(NamedTuple):
  """The centers of a pass, prepared for a search.

  Attributes:
    c_KD: all centers, float32.
    scored_KP: the centers minus the mean of the rows, on the dimensions that a
      full search scores, in the type of the scores.
    basis_DP: the leading dimensions as columns; None if all are scored.
    reach: the most that the cosine of any row to any center is taken to have
      grown since the first pass. It adds up the estimates of all updates.
  """

  c_KD: jax.Array
  scored_KP: jax.Array
  basis_DP: jax.Array | None
  reach: float


class Labels(NamedTuple):
  """The result of a search for each row of a chunk.

  Attributes:
    label_n: the number of the row's center.
    score_n: the row's cosine to this center, when the row was last compared.
    lead_n: this cosine minus the best cosine to another candidate, and minus
      what the lead is taken to have shrunk since the row was last compared.
    floor_n: the worst candidate's cosine at the row's last full search, minus
      the reach at that time. So floor_n plus the reach of a later pass is taken
      as the largest cosine to a center outside the candidates in that pass.
    ids_nC: the numbers of the candidates.
  """

  label_n: jax.Array
  score_n: jax.Array
  lead_n: jax.Array
  floor_n: jax.Array
  ids_nC: jax.Array


@functools.cache
def make_full_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the program that searches all centers for each row of a chunk.

  The program takes Centers, a chunk [n, D] and the present label of each row
  [n]. It returns Labels.
  """

  def full(centers, x_nD, label_n):
    return _search_fully(centers, x_nD, label_n, num_centers)

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return programs.on_mesh(full, mesh, (all_, rows, rows), rows)


@functools.cache
def make_quick_search(mesh: Mesh, num_centers: int) -> Callable:
  """Makes the program that searches the candidates of each row of a chunk.

  The program takes Centers, the distance that each of them moved in the last
  update [K], a chunk [n, D] and the Labels of the pass before. It returns the
  new Labels. A row that it leaves out keeps its cosine of an earlier pass.
  Rows with stale candidates get a full search.
  """

  def quick(centers, drift_K, x_nD, labels):
    # Any candidate may have come near, so the one that moved farthest counts.
    moved_n = drift_K[labels.label_n] + jnp.max(drift_K[labels.ids_nC], axis=1)
    labels = labels._replace(lead_n=labels.lead_n - _LEAD_SHARE * moved_n)
    usable_n = jnp.isfinite(labels.score_n)  # Zero rows have infinite cosines.

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
  return programs.on_mesh(quick, mesh, (all_, all_, rows, rows), rows)


def _search_fully(centers: Centers, x_nD, label_n, num_centers) -> Labels:
  """Searches all centers for each row; label_n are the present labels."""
  c_KD, scored_KP, basis_DP, reach = centers
  xs_nP = x_nD if basis_DP is None else x_nD @ basis_DP
  ids_nC = seek(scored_KP, xs_nP.astype(scored_KP.dtype), num_centers)
  label_n, score_n, lead_n, last_n = compare(x_nD, c_KD, label_n, ids_nC)
  return Labels(label_n, score_n, lead_n, last_n - reach, ids_nC)


def seek(scored_KP: jax.Array, xs_nP: jax.Array, num_centers: int) -> jax.Array:
  """Finds the candidates of each row.

  Args:
    scored_KP: the centers on the scored dimensions, with padding replaced.
    xs_nP: the rows on these dimensions, in the same type.
    num_centers: K without padding.

  Returns:
    The numbers of the candidates [n, C].
  """
  rows = min(256, _TILE_SCORES // min(len(scored_KP), _TILE_CENTERS))
  rows = min(1 << (rows.bit_length() - 1), len(xs_nP))

  def tile(xs_TP):
    return _best_of_buckets(scored_KP, xs_TP, num_centers)

  return search.map_tiles(tile, rows, xs_nP)


def compare(
  x_nD: jax.Array, c_KD: jax.Array, label_n: jax.Array, ids_nC: jax.Array
) -> tuple[jax.Array, ...]:
  """Compares each row's own center and its candidates, a tile after the other.

  Args:
    x_nD: unit rows.
    c_KD: all centers.
    label_n: the row's own center.
    ids_nC: the row's candidates.

  Returns:
    The results of `best_candidate`, and the worst candidate's cosine, all [n].
  """

  def tile(x_TD, label_T, ids_TC):
    ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
    s_TM = search.cosines(x_TD, c_KD, ids_TM)
    return *_best(ids_TM, s_TM), jnp.min(s_TM[:, 1:], axis=1)

  return search.map_tiles(tile, search.COMPARED_ROWS, x_nD, label_n, ids_nC)


def _best_of_buckets(scored_KP, xs_TP, num_centers):
  """Finds the candidates of the rows of a tile.

  Center number r * B + b is row r of bucket b. The candidates are the best
  among the best two centers of each bucket, so a center is missed if two better
  ones are in its bucket.

  Args:
    scored_KP: the centers on the scored dimensions.
    xs_TP: the rows on these dimensions.
    num_centers: K without padding.

  Returns:
    The numbers of the candidates [T, C].
  """
  # The number r of a center replaces the low bits of its score, so that one
  # maximum finds both the score and the center. Those bits mean less than the
  # dimensions that are left out.
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
    # Only the best of each part competes for the best two of the bucket. If the
    # second best is in the same part it is missed, which is rare.
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
  # The axis X has the best of all buckets, then the second best of all buckets.
  key_XT = jnp.concatenate(best)
  ids = []
  for _ in range(COUNT):
    key_T, place_T = search.first_max(key_XT)
    row_T = lax.bitcast_convert_type(key_T, jnp.int32) & mask
    ids.append(row_T * _NUM_BUCKETS + place_T % _NUM_BUCKETS)
    place_XT = lax.broadcasted_iota(jnp.int32, key_XT.shape, 0)
    key_XT = jnp.where(place_XT == place_T[None], -jnp.inf, key_XT)
  ids_TC = jnp.stack(ids, axis=1)
  # Padding has copies of center 0, so that is the center it stands for.
  return jnp.where(ids_TC < num_centers, ids_TC, 0)


def best_candidate(
  x_TD: jax.Array, c_KD: jax.Array, label_T: jax.Array, ids_TC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Compares each row's own center and its candidates on all dimensions.

  Args:
    x_TD: unit rows.
    c_KD: all centers.
    label_T: the number of the row's own center.
    ids_TC: the numbers of the row's candidates.

  Returns:
    The number of the best center [T], the cosine to it, and its lead: this
    cosine minus that of the next best center. Among equals the row's own center
    is the best.
  """
  ids_TM = jnp.concatenate([label_T[:, None], ids_TC], axis=1)
  return _best(ids_TM, search.cosines(x_TD, c_KD, ids_TM))


def _best(ids_TM, s_TM):
  """Finds the best of some centers for each row.

  Args:
    ids_TM: the numbers of the centers; a number may occur more than once.
    s_TM: the row's cosines to them.

  Returns:
    The results that `best_candidate` describes.
  """
  best_T, place_T = search.first_max(s_TM.T)
  ids_T = jnp.take_along_axis(ids_TM, place_T[:, None], axis=1)[:, 0]
  # The row's own center is often a candidate too, so every copy is masked.
  others_TM = jnp.where(ids_TM == ids_T[:, None], -jnp.inf, s_TM)
  return ids_T, best_T, best_T - jnp.max(others_TM, axis=1)
