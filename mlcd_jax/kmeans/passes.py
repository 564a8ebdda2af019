"""The compiled parts of an iteration of k-means, and its plan.

Shapes: N points, K centers, D dimensions. Upper case is global, lower case this
device's part.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import sharding

# Points that move from one center to another at a time.
_MOVED_ROWS = 64


def abstract_pass(
  mesh: Mesh, num_centers: int, dim: int, *, score_dtype=jnp.bfloat16
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
  """The program that takes nearly all the time, and what it is called with.

  Args:
    mesh: of all devices.
    num_centers: K.
    dim: D.
    score_dtype: of the products' operands.

  Returns:
    The jitted function that adds a chunk of points to the sums of their
    centers, and its arguments' shapes, types and shardings.
  """
  rows = nearest.padded_centers(num_centers, mesh)
  chunk = points.chunk_rows(mesh, nearest.tile_shape(mesh, num_centers)[0])
  parts = mesh.shape['data']
  return make_add(mesh, num_centers, jnp.dtype(score_dtype)), tuple(
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for shape, dtype, spec in (
      ((rows, dim), jnp.float32, sharding.CENTERS),
      ((dim,), jnp.float32, sharding.REPLICATED),
      ((parts, rows, dim), jnp.float32, nearest.SUMS),
      ((parts, rows), jnp.int32, nearest.SUMS),
      ((chunk, dim), jnp.float32, sharding.POINTS),
    )
  )


@functools.cache
def make_add(mesh: Mesh, num_centers: int, score_dtype: jnp.dtype):
  """A chunk -> labels, scores, sums, counts, cosines, bad points."""
  tile = nearest.tile_shape(mesh, num_centers)

  def add(c_kD, mean_D, sums_1kD, counts_1k, x_nD):
    # Embeddings share a large mean, which would take up most of a low
    # precision's digits. Without it the order of the centers is the same.
    c_kD = nearest.real_centers(c_kD, num_centers) - mean_D[None]
    score, center = nearest.best_center(
      c_kD.astype(score_dtype), x_nD.astype(score_dtype), tile=tile
    )
    center += lax.axis_index('fsdp') * c_kD.shape[0]
    score, center = nearest.merge(score[:, None], center[:, None], 1)
    score_n, center_n = score[:, 0], center[:, 0]
    found = _accumulate(
      sums_1kD, counts_1k, x_nD, center_n, score_n + x_nD @ mean_D
    )
    return center_n, score_n, *found

  rows, sums = sharding.POINTS, nearest.SUMS
  return jax.jit(
    jax.shard_map(
      add,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.REPLICATED, sums, sums, rows),
      out_specs=(rows, rows, sums, sums, rows, sharding.REPLICATED),
      # Equal on all devices by construction, which types cannot show.
      check_vma=False,
    ),
    donate_argnums=(2, 3),
  )


@functools.cache
def make_accumulate(mesh: Mesh):
  """A chunk with labels -> sums, counts, cosines, bad points."""
  rows, sums = sharding.POINTS, nearest.SUMS
  return jax.jit(
    jax.shard_map(
      _accumulate,
      mesh=mesh,
      in_specs=(sums, sums, rows, rows, rows),
      out_specs=(sums, sums, rows, sharding.REPLICATED),
      check_vma=False,
    ),
    donate_argnums=(0, 1),
  )


def _accumulate(sums_1kD, counts_1k, x_nD, center_n, cosine_n):
  """Sums and counts with a chunk; its cosines, infinite for bad points."""
  usable_n = jnp.sum(jnp.square(x_nD), axis=1) > 0
  return (
    *nearest.add_points(sums_1kD, counts_1k, x_nD, center_n, usable_n),
    jnp.where(usable_n, cosine_n, jnp.inf),
    lax.psum(jnp.sum(~usable_n), 'data'),
  )


@functools.cache
def make_move(mesh: Mesh):
  """A chunk, its labels before and now -> sums, counts."""

  def move(sums_1kD, counts_1k, x_nD, old_n, new_n):
    def tile(rows, flagged, found):
      x_TD = x_nD[rows]
      found = nearest.add_points(*found, x_TD, old_n[rows], flagged, -1)
      return nearest.add_points(*found, x_TD, new_n[rows], flagged)

    changed_n = old_n != new_n
    return nearest.for_flagged(
      tile, changed_n, (sums_1kD, counts_1k), _MOVED_ROWS
    )

  rows, sums = sharding.POINTS, nearest.SUMS
  return jax.jit(
    jax.shard_map(
      move,
      mesh=mesh,
      in_specs=(sums, sums, rows, rows, rows),
      out_specs=(sums, sums),
      check_vma=False,
    ),
    donate_argnums=(0, 1),
  )


@functools.cache
def make_update(mesh: Mesh):
  """Centers, sums, counts -> centers, sum of cosines, counts, shifts [K]."""

  def update(c_kD, sums_1kD, counts_1k):
    sums_kD, counts_k = lax.psum((sums_1kD[0], counts_1k[0]), 'data')
    # The sum of every point's cosine to its center, in float32.
    total = lax.psum(jnp.sum(sums_kD * c_kD), 'fsdp')
    norm = jnp.sqrt(jnp.sum(jnp.square(sums_kD), axis=1, keepdims=True))
    new_kD = jnp.where(norm > 0, sums_kD / jnp.where(norm > 0, norm, 1), c_kD)
    shift_k = jnp.sqrt(jnp.sum(jnp.square(new_kD - c_kD), axis=1))
    return new_kD, total, counts_k, shift_k

  return jax.jit(
    jax.shard_map(
      update,
      mesh=mesh,
      in_specs=(sharding.CENTERS, nearest.SUMS, nearest.SUMS),
      out_specs=(
        sharding.CENTERS,
        sharding.REPLICATED,
        sharding.CENTERS,
        sharding.CENTERS,
      ),
      check_vma=False,
    ),
    donate_argnums=0,
  )


@functools.cache
def make_zeros(mesh: Mesh, rows: int, dim: int):
  """Makes: sums [data, K, D] and counts [data, K], padding included."""
  parts = mesh.shape['data']
  return jax.jit(
    lambda: (
      jnp.zeros((parts, rows, dim), jnp.float32),
      jnp.zeros((parts, rows), jnp.int32),
    ),
    out_shardings=NamedSharding(mesh, nearest.SUMS),
  )


@functools.cache
def make_replace(mesh: Mesh):
  """Centers, numbers of some, rows in their place -> centers."""
  return jax.jit(
    lambda c_KD, ids, new: c_KD.at[ids].set(new, mode='drop'),
    out_shardings=NamedSharding(mesh, sharding.CENTERS),
    donate_argnums=0,
  )


@functools.partial(jax.jit, static_argnums=1)
def lowest(score_n: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The lowest scores and their places."""
  negative, place = lax.top_k(-score_n, count)
  return -negative, place
