"""The nearest centers of points, a tile of scores at a time.

Points are split over the mesh axis "data", centers over "fsdp". Tiles have a
fixed shape and ties go to the lower index, so that every mesh gives the same
result. Shapes: N points, K centers, D dimensions, T points a tile, L labels a
point. Upper case is global, lower case this device's part.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding

# Rows and centers of a score tile. Mesh-independent, so that products are
# computed alike everywhere; on CPUs a tile must stay in the cache.
_CPU_TILE = (256, 512)
_ACCELERATOR_TILE = (4_096, 2_048)

# Each part of the mesh sums its own points; the parts meet once a pass.
SUMS = jax.sharding.PartitionSpec('data', 'fsdp')


def tile_shape(mesh: Mesh) -> tuple[int, int]:
  """Points and centers of a score tile."""
  cpu = mesh.devices.flat[0].platform == 'cpu'
  return _CPU_TILE if cpu else _ACCELERATOR_TILE


def padded_centers(num_centers: int, mesh: Mesh) -> int:
  """Centers on the devices, padding included."""
  tile = tile_shape(mesh)[1] * mesh.shape['fsdp']
  return -(-num_centers // tile) * tile


def put_centers(centers: np.ndarray, mesh: Mesh) -> jax.Array:
  """Centers on the devices, padded with zero rows to whole tiles."""
  num_centers, dim = centers.shape
  padded = np.zeros((padded_centers(num_centers, mesh), dim), np.float32)
  padded[:num_centers] = centers
  return jax.make_array_from_callback(
    padded.shape,
    NamedSharding(mesh, sharding.CENTERS),
    lambda index: padded[index],
  )


def to_host(x: jax.Array) -> np.ndarray:
  """The whole array on this host, from every process."""
  if not x.is_fully_addressable:
    replicated = NamedSharding(x.sharding.mesh, sharding.REPLICATED)
    x = jax.jit(lambda a: a, out_shardings=replicated)(x)
  return np.asarray(x)


def _scores(c_kD, x_TD, first_center, num_centers, precision=None):
  """Cosines [k, T] with float32 accumulation; -inf for padded centers.

  Centers run down the rows, so that reducing over them is element-wise.
  """
  s_kT = lax.dot_general(
    c_kD,
    x_TD,
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  center = first_center + lax.broadcasted_iota(jnp.int32, s_kT.shape, 0)
  return jnp.where(center < num_centers, s_kT, -jnp.inf)


def best_center(c_kD, x_nD, *, tile, num_centers):
  """Best score and center [n] among this device's centers, tile by tile."""
  tile_rows, tile_centers = tile
  k, dim = c_kD.shape
  offset = lax.axis_index('fsdp') * k
  starts = jnp.arange(0, k, tile_centers, dtype=jnp.int32)
  c_tiles = c_kD.reshape(-1, tile_centers, dim)

  def rows(x_TD):
    def centers(best, start_and_tile):
      best_score, best_id = best
      start, c_tD = start_and_tile
      s_tT = _scores(c_tD, x_TD, offset + start, num_centers)
      # Two plain reductions: argmax costs as much as the product on CPUs.
      score = jnp.max(s_tT, axis=0)
      row = lax.broadcasted_iota(jnp.int32, s_tT.shape, 0)
      first = jnp.min(jnp.where(s_tT == score[None], row, tile_centers), axis=0)
      better = score > best_score
      return (
        jnp.where(better, score, best_score),
        jnp.where(better, offset + start + first, best_id),
      ), None

    unknown = (
      jnp.full(tile_rows, -jnp.inf, jnp.float32),
      jnp.full(tile_rows, num_centers, jnp.int32),
    )
    return lax.scan(centers, unknown, (starts, c_tiles))[0]

  score, center = lax.map(rows, x_nD.reshape(-1, tile_rows, dim))
  return score.reshape(-1), center.reshape(-1)


def merge(score, center, num_labels):
  """Best of all devices' candidates [n, l]; ties to the lower center."""

  def candidates(x):  # [n, fsdp * l], lower centers first.
    x = lax.all_gather(x, 'fsdp', axis=1)
    return x.reshape(x.shape[0], -1)

  best, place = lax.top_k(candidates(score), num_labels)
  return best, jnp.take_along_axis(candidates(center), place, axis=1)


@functools.cache
def make_lookup(mesh: Mesh, num_centers: int, num_labels: int):
  """Makes: centers, points -> scores and nearest centers, both [n, L]."""
  tile_rows, tile_centers = tile_shape(mesh)

  def lookup(c_kD, x_nD):
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
    return merge(
      score.reshape(-1, num_labels), center.reshape(-1, num_labels), num_labels
    )

  return jax.jit(
    jax.shard_map(
      lookup,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.POINTS),
      out_specs=(sharding.POINTS, sharding.POINTS),
      check_vma=False,
    )
  )
