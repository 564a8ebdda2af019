"""The nearest centers of every point, exact in float32.

On CPUs with products of bfloat16 the best candidates by bfloat16 scores are
scored again in float32. What was left out could be nearer only by the rounding
of the operands, which has a bound; the few points where that would matter are
scored in float32 against all centers. Elsewhere every score is float32.

Shapes: N points, K centers, D dimensions, T points a tile, L labels and M
candidates a point. Upper case is global, lower case this device's part.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import candidates
from mlcd_jax import nearest
from mlcd_jax import sharding

# Candidates are this many more than the labels, so that few points are in
# doubt, and a multiple of 16, which the product scores all alike.
_SPARE = 8

# Centers below which a plain search is as fast.
_MIN_CENTERS = 1_024

# Points of a tile of float32 scores; with more they leave the cache.
_TILE_ROWS = 64

# Buckets of centers among which the best are looked for first.
_BUCKETS = 256


def make_lookup(mesh: Mesh, num_centers: int, num_labels: int):
  """Makes: centers, points -> scores and nearest centers, both [n, L]."""
  many = _num_candidates(num_labels) > _BUCKETS // 4
  if not nearest.on_cpu(mesh) or num_centers < _MIN_CENTERS or many:
    return _make_plain(mesh, num_centers, num_labels)
  if nearest.score_dtype(mesh) == jnp.bfloat16:
    return _make_rescored(mesh, num_centers, num_labels)
  return _make_bucketed(mesh, num_centers, num_labels)


def _num_candidates(num_labels: int) -> int:
  return nearest.up(num_labels + _SPARE, 16)


@functools.cache
def _make_bucketed(mesh: Mesh, num_centers: int, num_labels: int):
  """Candidates by float32 scores over all centers at once."""
  count = _num_candidates(num_labels)

  def look_up(c_kD, x_nD):
    c_KD = lax.all_gather(c_kD, 'fsdp', tiled=True)

    def tile(x_TD):
      _, ids_TM = _top(c_KD, x_TD, num_centers, count)
      return _rescore(c_KD, x_TD, ids_TM, num_labels)

    found = lax.map(tile, x_nD.reshape(-1, _TILE_ROWS, x_nD.shape[1]))
    return tuple(a.reshape(-1, num_labels) for a in found)

  return _on_mesh(look_up, mesh)


@functools.cache
def _make_rescored(mesh: Mesh, num_centers: int, num_labels: int):
  """Candidates by bfloat16 scores, then float32."""
  count = _num_candidates(num_labels)

  def look_up(c_kD, x_nD):
    c_KD = lax.all_gather(c_kD, 'fsdp', tiled=True)
    mean_D = jnp.sum(c_KD, axis=0) / num_centers
    # What all centers share changes no order, and rounds worse.
    centered_KD = c_KD - mean_D[None]
    low_KD = centered_KD.astype(jnp.bfloat16)
    # 2 MB of scores stay in the cache.
    tile_rows = max(8, min(256, 2**19 // len(c_KD)))
    tile_rows = 1 << (tile_rows.bit_length() - 1)
    most_norm = jnp.max(_norm(centered_KD))
    most_error = jnp.max(_norm(centered_KD - low_KD.astype(jnp.float32)))

    def exactly(rows, found):
      del found
      x_TD = x_nD[rows]
      _, ids_TM = _top(c_KD, x_TD, num_centers, count)
      return *_rescore(c_KD, x_TD, ids_TM, num_labels), jnp.zeros_like(rows)

    def tile(x_TD):
      low_TD = x_TD.astype(jnp.bfloat16)
      s_TM, ids_TM = _top(low_KD, low_TD, num_centers, count)
      score_TL, ids_TL = _rescore(c_KD, x_TD, ids_TM, num_labels)
      # Cauchy-Schwarz for the rounding of both operands, and of the sums.
      rounded_TD = low_TD.astype(jnp.float32)
      bound_T = (
        _norm(x_TD - rounded_TD) * most_norm
        + _norm(rounded_TD) * most_error
        + 4 * x_TD.shape[1] * jnp.finfo(jnp.float32).eps
      )
      last_T = score_TL[:, -1] - x_TD @ mean_D
      return score_TL, ids_TL, (last_T <= s_TM[:, -1] + bound_T).astype(int)

    tiles = x_nD.reshape(-1, tile_rows, x_nD.shape[1])
    found = tuple(a.reshape(-1, *a.shape[2:]) for a in lax.map(tile, tiles))
    return nearest.redo(exactly, found[2] > 0, found, tile_rows)[:2]

  return _on_mesh(look_up, mesh)


def _top(c_KD, x_TD, num_centers, count):
  """The largest scores [T, count] and their centers.

  They lie in the `count` buckets with the largest maxima.
  """
  s_KT = nearest.products(c_KD, x_TD, lax.Precision.HIGHEST)
  if num_centers < len(c_KD):
    center = lax.broadcasted_iota(jnp.int32, s_KT.shape, 0)
    s_KT = jnp.where(center < num_centers, s_KT, -jnp.inf)
  s_RBT = s_KT.reshape(-1, _BUCKETS, len(x_TD))
  _, bucket_TM = lax.top_k(jnp.max(s_RBT, axis=0).T, count)
  s_RMT = jnp.take_along_axis(s_RBT, bucket_TM.T[None], axis=1)
  s_TC = s_RMT.transpose(2, 0, 1).reshape(len(x_TD), -1)
  score, place = lax.top_k(s_TC, count)
  bucket = jnp.take_along_axis(bucket_TM, place % count, axis=1)
  return score, place // count * _BUCKETS + bucket


def _rescore(c_KD, x_TD, ids_TM, num_labels):
  """Cosines and centers [T, L], the best of the candidates by float32."""
  # top_k keeps the earlier of equals, which must be the lower center.
  ids_TM = jnp.sort(ids_TM, axis=1)
  s_TM = candidates.tiled_cosines(x_TD, c_KD, ids_TM)
  score_TL, place_TL = lax.top_k(s_TM, num_labels)
  return score_TL, jnp.take_along_axis(ids_TM, place_TL, axis=1)


def _norm(rows):
  return jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))


def _on_mesh(look_up, mesh):
  return jax.jit(
    jax.shard_map(
      look_up,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.POINTS),
      out_specs=(sharding.POINTS, sharding.POINTS),
      check_vma=False,
    )
  )


@functools.cache
def _make_plain(mesh: Mesh, num_centers: int, num_labels: int):
  """All in float32, a tile of centers after the other."""
  tile_rows, tile_centers = nearest.tile_shape(mesh, num_centers)

  def look_up(c_kD, x_nD):
    k, dim = c_kD.shape
    offset = lax.axis_index('fsdp') * k
    starts = offset + jnp.arange(0, k, tile_centers, dtype=jnp.int32)
    c_tiles = c_kD.reshape(-1, tile_centers, dim)

    def rows(x_TD):
      def centers(best, start_and_tile):
        start, c_tD = start_and_tile
        s_Tt = _scores(c_tD, x_TD, start, num_centers, lax.Precision.HIGHEST).T
        center = start + lax.broadcasted_iota(jnp.int32, s_Tt.shape, 1)
        # What is held comes first: top_k keeps the earlier of equals.
        scores = jnp.concatenate([best[0], s_Tt], axis=1)
        ids = jnp.concatenate([best[1], center], axis=1)
        score, place = lax.top_k(scores, num_labels)
        return (score, jnp.take_along_axis(ids, place, axis=1)), None

      unknown = (
        jnp.full((tile_rows, num_labels), -jnp.inf, jnp.float32),
        jnp.full((tile_rows, num_labels), num_centers, jnp.int32),
      )
      return lax.scan(centers, unknown, (starts, c_tiles))[0]

    score, center = lax.map(rows, x_nD.reshape(-1, tile_rows, dim))
    return nearest.merge(
      score.reshape(-1, num_labels), center.reshape(-1, num_labels), num_labels
    )

  return _on_mesh(look_up, mesh)


def _scores(c_kD, x_TD, first_center, num_centers, precision=None):
  """Cosines [k, T]; -inf for padded centers."""
  s_kT = nearest.products(c_kD, x_TD, precision)
  center = first_center + lax.broadcasted_iota(jnp.int32, s_kT.shape, 0)
  return jnp.where(center < num_centers, s_kT, -jnp.inf)
