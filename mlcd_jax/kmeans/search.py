"""The nearest centers of points, a tile of scores at a time.

Points are split over the mesh axis "data", centers over "fsdp". Tiles have a
fixed shape and ties go to the lower index, so that every mesh gives the same
result. Shapes: N points, K centers, D dimensions, T points a tile, L labels a
point. Upper case is global, lower case this device's part.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding

# Rows and centers of a score tile. Mesh-independent, so that products are
# computed alike everywhere. On CPUs products of bfloat16 with many centers are
# fastest (Zen 5); float32's where the scores stay in the cache (Zen 3).
_CPU_TILE = {'bfloat16': (256, 4_096), 'float32': (256, 1_024)}
_ACCELERATOR_TILE = (4_096, 2_048)

# Each part of the mesh sums its own points; the parts meet once a pass.
SUMS = jax.sharding.PartitionSpec('data', 'fsdp')

to_host = sharding.to_host


def on_cpu(mesh: Mesh) -> bool:
  """Whether the devices of a mesh are CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def score_dtype(mesh: Mesh) -> jnp.dtype:
  """What products' operands are rounded to: the fastest type that will do."""
  if on_cpu(mesh) and not _multiplies_bfloat16():
    return jnp.dtype(jnp.float32)
  return jnp.dtype(jnp.bfloat16)


@functools.cache
def _multiplies_bfloat16() -> bool:
  """Whether this machine's processor has products of bfloat16.

  With them XLA's are twice as fast as float32's, without a third as fast (Zen 5
  and Zen 3). Linux says so; elsewhere the answer is no.
  """
  cpu = pathlib.Path('/proc/cpuinfo')
  flags = cpu.read_text().split() if cpu.exists() else []
  return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def tile_shape(mesh: Mesh, num_centers: int) -> tuple[int, int]:
  """Points and centers of a score tile."""
  if not on_cpu(mesh):
    return _ACCELERATOR_TILE
  rows, centers = _CPU_TILE[score_dtype(mesh).name]
  return rows, min(centers, up(num_centers, 256))


def padded_centers(num_centers: int, mesh: Mesh) -> int:
  """Centers on the devices, padding included."""
  tile = tile_shape(mesh, num_centers)[1]
  return up(num_centers, tile * mesh.shape['fsdp'])


def up(number: int, multiple: int) -> int:
  """The next multiple that is not lower."""
  return -(-number // multiple) * multiple


def divisor(number: int, most: int) -> int:
  """The largest divisor that is not above `most`."""
  return next(d for d in range(min(number, most), 0, -1) if not number % d)


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


def real_centers(c_kD: jax.Array, num_centers: int) -> jax.Array:
  """Centers with copies of the first one in the place of padding.

  A copy never wins: among equals the lower center is taken.
  """
  k = c_kD.shape[0]
  shard = lax.axis_index('fsdp')
  first_D = lax.psum(jnp.where(shard == 0, c_kD[0], 0), 'fsdp')
  center = shard * k + lax.broadcasted_iota(jnp.int32, c_kD.shape, 0)
  return jnp.where(center < num_centers, c_kD, first_D[None])


def first_max(s_tT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Largest value and its first row [T]."""
  # Two plain reductions: argmax costs as much as the product on CPUs.
  score = jnp.max(s_tT, axis=0)
  row = lax.broadcasted_iota(jnp.int32, s_tT.shape, 0)
  rows = s_tT.shape[0]
  return score, jnp.min(jnp.where(s_tT == score[None], row, rows), axis=0)


def products(c_tD: jax.Array, x_TD: jax.Array, precision=None) -> jax.Array:
  """Scores [t, T] with float32 accumulation.

  Centers run down the rows, so that reducing over them is element-wise.
  """
  return lax.dot_general(
    c_tD,
    x_TD,
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def best_center(
  c_kD: jax.Array, x_nD: jax.Array, *, tile: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
  """Best score and first row of it [n] among centers without padding."""
  tile_rows, tile_centers = tile
  k, dim = c_kD.shape
  rows = x_nD.reshape(-1, tile_rows, dim)

  def among(c_tD):
    score, place = lax.map(lambda x_TD: first_max(products(c_tD, x_TD)), rows)
    return score.reshape(-1), place.reshape(-1)

  if k == tile_centers:
    return among(c_kD)

  def merge_tile(best, start_and_tile):
    start, c_tD = start_and_tile
    score, place = among(c_tD)
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


def add_points(
  sums_1kD: jax.Array,
  counts_1k: jax.Array,
  x_nD: jax.Array,
  center_n: jax.Array,
  usable_n: jax.Array,
  sign: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Adds points to this device's sums; other devices' centers are left out."""
  k = counts_1k.shape[1]
  local = center_n - lax.axis_index('fsdp') * k
  local = jnp.where(usable_n & (local >= 0) & (local < k), local, k)
  return (
    sums_1kD.at[0, local].add(sign * x_nD, mode='drop'),
    counts_1k.at[0, local].add(sign, mode='drop'),
  )


def merge(score, center, num_labels):
  """Best of all devices' candidates [n, l]; ties to the lower center."""

  def candidates(x):  # [n, fsdp * l], lower centers first.
    x = lax.all_gather(x, 'fsdp', axis=1)
    return x.reshape(x.shape[0], -1)

  best, place = lax.top_k(candidates(score), num_labels)
  return best, jnp.take_along_axis(candidates(center), place, axis=1)


def redo(
  search: Callable,
  flag_n: jax.Array,
  found: tuple[jax.Array, ...],
  tile_rows: int,
) -> tuple[jax.Array, ...]:
  """Searches anew for some points, a tile of them at a time.

  Args:
    search: takes row numbers [T] and their part of `found`, gives it anew.
    flag_n: which points.
    found: arrays [n, ...].
    tile_rows: T.

  Returns:
    `found`, with the new values.
  """

  def tile(rows, flagged, found):
    new = search(rows, tuple(a[rows] for a in found))
    place = jnp.where(flagged, rows, len(flag_n))
    return tuple(a.at[place].set(b, mode='drop') for a, b in zip(found, new))

  return for_flagged(tile, flag_n, found, tile_rows)


def for_flagged(
  body: Callable, flag_n: jax.Array, carry: Any, tile_rows: int
) -> Any:
  """Runs a loop over some points, a tile of them at a time.

  Args:
    body: takes row numbers [T], which of them are meant, since the last tile
      may have others too, and the carry; gives the carry.
    flag_n: which points.
    carry: arrays.
    tile_rows: T.
  """
  n = flag_n.shape[0]
  count = jnp.sum(flag_n)
  place_n = jnp.where(flag_n, jnp.cumsum(flag_n) - 1, n)
  row_n = jnp.arange(n, dtype=jnp.int32)
  todo_n = jnp.zeros(n, jnp.int32).at[place_n].set(row_n, mode='drop')

  def tile(i, carry):
    rows = lax.dynamic_slice_in_dim(todo_n, i * tile_rows, tile_rows)
    return body(rows, i * tile_rows + jnp.arange(tile_rows) < count, carry)

  return lax.fori_loop(0, (count + tile_rows - 1) // tile_rows, tile, carry)
