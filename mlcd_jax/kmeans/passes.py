"""The compiled parts of an iteration of k-means.

Shapes: N rows, K centers, D dimensions, n rows of a chunk. Upper case is
global, lower case this device's part.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from mlcd_jax import sharding
from mlcd_jax.kmeans import chunks
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# Sums [data, K, D] and counts [data, K]: each part of the axis "data" sums its
# own rows, and the parts are added once a pass.
SUMS = jax.sharding.PartitionSpec('data', 'fsdp')

# Rows that move from one center to another at a time. In a late pass few rows
# of a chunk move, so that larger tiles are mostly padding.
_MOVED_ROWS = 64


def on_mesh(
  function: Callable,
  mesh: Mesh,
  in_specs: Any,
  out_specs: Any,
  *,
  donate: tuple[int, ...] = (),
) -> Callable:
  """Compiles a function of each device's parts.

  Args:
    function: takes and returns parts of arrays.
    mesh: of all devices.
    in_specs: PartitionSpecs of the arguments.
    out_specs: PartitionSpecs of the results.
    donate: numbers of the arguments whose memory the results may take.
  """
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    # Results are equal on all devices by construction, which the types of
    # shard_map cannot show.
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=donate)


def abstract_pass(
  mesh: Mesh, num_centers: int, dim: int, *, score_dtype=jnp.bfloat16
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
  """Returns the program that takes nearly all the time, and its arguments.

  Args:
    mesh: of all devices.
    num_centers: K.
    dim: D.
    score_dtype: type of the products' operands.

  Returns:
    The jitted function that adds a chunk of rows to the sums of their centers,
    and its arguments' shapes, types and shardings.
  """
  rows = tiles.padded_centers(num_centers, mesh)
  chunk = chunks.chunk_rows(mesh, tiles.tile_shape(mesh, num_centers)[0])
  parts = mesh.shape['data']
  return make_add(mesh, num_centers, jnp.dtype(score_dtype)), tuple(
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for shape, dtype, spec in (
      ((rows, dim), jnp.float32, sharding.CENTERS),
      ((dim,), jnp.float32, sharding.REPLICATED),
      ((parts, rows, dim), jnp.float32, SUMS),
      ((parts, rows), jnp.int32, SUMS),
      ((chunk, dim), jnp.float32, sharding.POINTS),
    )
  )


@functools.cache
def make_add(mesh: Mesh, num_centers: int, score_dtype: jnp.dtype) -> Callable:
  """Makes the exact pass over a chunk.

  The program takes centers [K, D], the rows' mean [D], sums, counts and a chunk
  [n, D]. It compares every row with every center and returns sums, counts,
  cosines [n] to the best centers (infinite for bad rows), and the number of bad
  rows.
  """
  tile = tiles.tile_shape(mesh, num_centers)

  def add(c_kD, mean_D, sums_1kD, counts_1k, x_nD):
    # Embeddings share a large mean, which would take up most of a low
    # precision's digits. Without it the order of the centers is the same.
    c_kD = search.real_centers(c_kD, num_centers) - mean_D[None]
    score, center = search.best_center(
      c_kD.astype(score_dtype), x_nD.astype(score_dtype), tile=tile
    )
    center += lax.axis_index('fsdp') * c_kD.shape[0]
    score, center = search.merge_devices(score[:, None], center[:, None], 1)
    return _accumulate(
      sums_1kD, counts_1k, x_nD, center[:, 0], score[:, 0] + x_nD @ mean_D
    )

  rows, all_ = sharding.POINTS, sharding.REPLICATED
  return on_mesh(
    add,
    mesh,
    (sharding.CENTERS, all_, SUMS, SUMS, rows),
    (SUMS, SUMS, rows, all_),
    donate=(2, 3),
  )


@functools.cache
def make_accumulate(mesh: Mesh) -> Callable:
  """Makes: sums, counts, rows, labels, cosines -> as `make_add` returns."""
  rows = sharding.POINTS
  return on_mesh(
    _accumulate,
    mesh,
    (SUMS, SUMS, rows, rows, rows),
    (SUMS, SUMS, rows, sharding.REPLICATED),
    donate=(0, 1),
  )


def _accumulate(sums_1kD, counts_1k, x_nD, center_n, cosine_n):
  """Adds a chunk; returns also its cosines, infinite for bad rows."""
  usable_n = jnp.sum(jnp.square(x_nD), axis=1) > 0
  return (
    *_add_rows(sums_1kD, counts_1k, x_nD, center_n, usable_n),
    jnp.where(usable_n, cosine_n, jnp.inf),
    lax.psum(jnp.sum(~usable_n), 'data'),
  )


def _add_rows(sums_1kD, counts_1k, x_nD, center_n, usable_n, sign=1):
  """Adds rows to the sums of this device's centers; leaves out all others."""
  k = counts_1k.shape[1]
  local = center_n - lax.axis_index('fsdp') * k
  local = jnp.where(usable_n & (local >= 0) & (local < k), local, k)
  return (
    sums_1kD.at[0, local].add(sign * x_nD, mode='drop'),
    counts_1k.at[0, local].add(sign, mode='drop'),
  )


@functools.cache
def make_move(mesh: Mesh) -> Callable:
  """Makes: sums, counts, a chunk, its old and new labels -> sums, counts.

  Only the rows whose label changed are moved.
  """

  def move(sums_1kD, counts_1k, x_nD, old_n, new_n):
    def tile(rows, is_moved, sums_and_counts):
      x_TD = x_nD[rows]
      without = _add_rows(*sums_and_counts, x_TD, old_n[rows], is_moved, -1)
      return _add_rows(*without, x_TD, new_n[rows], is_moved)

    return search.for_flagged(
      tile, old_n != new_n, (sums_1kD, counts_1k), _MOVED_ROWS
    )

  rows = sharding.POINTS
  return on_mesh(
    move, mesh, (SUMS, SUMS, rows, rows, rows), (SUMS, SUMS), donate=(0, 1)
  )


@functools.cache
def make_update(mesh: Mesh) -> Callable:
  """Makes the update of the centers after a pass.

  The program takes centers, sums and counts, and returns the new centers, the
  sum of all cosines to the old ones, counts [K], and how far each center moved
  [K]. A center without rows stays where it is.
  """

  def update(c_kD, sums_1kD, counts_1k):
    sums_kD, counts_k = lax.psum((sums_1kD[0], counts_1k[0]), 'data')
    # The sum of every row's cosine to its center, in float32.
    total = lax.psum(jnp.sum(sums_kD * c_kD), 'fsdp')
    norm = jnp.sqrt(jnp.sum(jnp.square(sums_kD), axis=1, keepdims=True))
    new_kD = jnp.where(norm > 0, sums_kD / jnp.where(norm > 0, norm, 1), c_kD)
    shift_k = jnp.sqrt(jnp.sum(jnp.square(new_kD - c_kD), axis=1))
    return new_kD, total, counts_k, shift_k

  centers = sharding.CENTERS
  return on_mesh(
    update,
    mesh,
    (centers, SUMS, SUMS),
    (centers, sharding.REPLICATED, centers, centers),
    donate=(0,),
  )


@functools.cache
def make_zeros(mesh: Mesh, rows: int, dim: int) -> Callable:
  """Makes: nothing -> zero sums and counts of so many padded centers."""
  parts = mesh.shape['data']
  return jax.jit(
    lambda: (
      jnp.zeros((parts, rows, dim), jnp.float32),
      jnp.zeros((parts, rows), jnp.int32),
    ),
    out_shardings=NamedSharding(mesh, SUMS),
  )


@functools.cache
def make_replace(mesh: Mesh) -> Callable:
  """Makes: centers, numbers of some, new rows for these -> centers.

  Numbers out of bounds are left out.
  """
  return jax.jit(
    lambda c_KD, ids, new: c_KD.at[ids].set(new, mode='drop'),
    out_shardings=NamedSharding(mesh, sharding.CENTERS),
    donate_argnums=0,
  )


@functools.partial(jax.jit, static_argnums=1)
def lowest(score_n: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the lowest scores and their places, the lowest first."""
  negative, place = lax.top_k(-score_n, count)
  return -negative, place
