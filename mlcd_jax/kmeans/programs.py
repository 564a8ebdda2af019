"""The compiled programs of an iteration of k-means.

Each `make_` function returns a program for a mesh and caches it. Centers have
padding rows so that each device has whole tiles. Sums and counts are the sum
and the number of the rows assigned to each center.

Shapes: N rows, K centers, D dimensions, n rows of a chunk, T rows of a tile.
Upper case is global, lower case this device's part. In a function that runs on
each device, a 1 stands for the device's part of the axis "data".
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

# Sums [data, K, D] and counts [data, K]. Each part of the axis "data" sums its
# own rows, so devices exchange sums once per pass and not once per chunk.
SUMS = jax.sharding.PartitionSpec('data', 'fsdp')

# The number of rows that `make_move` moves at a time. In a late pass few rows
# of a chunk move, so larger tiles would be mostly padding.
_MOVED_ROWS = 64


def on_mesh(
  function: Callable,
  mesh: Mesh,
  in_specs: Any,
  out_specs: Any,
  *,
  donate: tuple[int, ...] = (),
) -> Callable:
  """Compiles a function that runs on each device with its parts of the arrays.

  Args:
    function: the function; it takes and returns one device's parts of arrays.
    mesh: the mesh of all devices.
    in_specs: the PartitionSpecs of the arguments.
    out_specs: the PartitionSpecs of the results.
    donate: the positions of the arguments whose memory the results reuse. The
      caller cannot read these arguments after the call.

  Returns:
    The jitted function of the whole arrays.
  """
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    # Some results are equal on all devices because of how they are computed,
    # which shard_map's check of types cannot see.
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=donate)


def abstract_pass(
  mesh: Mesh, num_centers: int, dim: int, *, score_dtype=jnp.bfloat16
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
  """Returns the program of an exact pass over one chunk, with its arguments.

  Nearly all the time of k-means goes into this program. The arguments have no
  values, so it can be compiled, to learn the memory it needs, without data.

  Args:
    mesh: the mesh of all devices.
    num_centers: K.
    dim: D.
    score_dtype: the type that rows and centers are rounded to for scoring.

  Returns:
    The program of `make_add`, and the shapes, types and shardings of its
    arguments.
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
  """Makes the program of an exact pass over one chunk.

  The program takes centers [K, D], the approximate mean of the rows [D], sums,
  counts and a chunk [n, D]. It compares each row with every center and adds the
  row to the sum of the best one. It returns the new sums and counts, the cosine
  of each row to its center [n], and the number of zero rows. Zero rows are
  padding or bad rows: they are not added, and their cosine is infinite. The new
  sums and counts reuse the memory of the old.

  Args:
    mesh: the mesh of all devices.
    num_centers: K.
    score_dtype: the type that rows and centers are rounded to for scoring.
  """
  tile = tiles.tile_shape(mesh, num_centers)

  def add(c_kD, mean_D, sums_1kD, counts_1k, x_nD):
    # Embeddings share a large mean, which would use up most digits of a low
    # precision. Subtracting it from all centers lowers all scores of a row by
    # the same amount, so the best center stays the best.
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
  """Makes the program that adds a chunk whose labels are known.

  The program takes sums, counts, a chunk [n, D], the label of each row [n] and
  its cosine to that center [n]. It returns the same as that of `make_add`.
  """
  rows = sharding.POINTS
  return on_mesh(
    _accumulate,
    mesh,
    (SUMS, SUMS, rows, rows, rows),
    (SUMS, SUMS, rows, sharding.REPLICATED),
    donate=(0, 1),
  )


def _accumulate(sums_1kD, counts_1k, x_nD, center_n, cosine_n):
  """Adds a chunk to the sums of its centers.

  Returns:
    The new sums and counts, the cosines with those of zero rows made infinite,
    and the number of zero rows on all devices.
  """
  usable_n = jnp.sum(jnp.square(x_nD), axis=1) > 0
  return (
    *_add_rows(sums_1kD, counts_1k, x_nD, center_n, usable_n),
    jnp.where(usable_n, cosine_n, jnp.inf),
    lax.psum(jnp.sum(~usable_n), 'data'),
  )


def _add_rows(sums_1kD, counts_1k, x_nD, center_n, usable_n, sign=1):
  """Adds rows to the sums of this device's centers.

  Rows that are not usable, or whose center lies on another device, are skipped.
  A sign of -1 takes rows away.
  """
  k = counts_1k.shape[1]
  local = center_n - lax.axis_index('fsdp') * k
  # k is out of bounds, so that the updates below drop the row.
  local = jnp.where(usable_n & (local >= 0) & (local < k), local, k)
  return (
    sums_1kD.at[0, local].add(sign * x_nD, mode='drop'),
    counts_1k.at[0, local].add(sign, mode='drop'),
  )


@functools.cache
def make_move(mesh: Mesh) -> Callable:
  """Makes the program that moves rows from one center's sum to another's.

  The program takes sums, counts, a chunk [n, D], the old labels of its rows [n]
  and the new ones. It moves the rows whose label changed, and returns the new
  sums and counts. These reuse the memory of the old.
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
  """Makes the program that updates the centers after a pass.

  The program takes centers [K, D], sums and counts. It returns the new centers,
  the sum of the cosines of all rows to their old centers, the total counts [K],
  and the distance that each center moved [K]. A center without rows does not
  move. The new centers reuse the memory of the old.
  """

  def update(c_kD, sums_1kD, counts_1k):
    sums_kD, counts_k = lax.psum((sums_1kD[0], counts_1k[0]), 'data')
    # The product of a center and the sum of its rows is the sum of their
    # cosines. Unlike the scores of the pass it is all float32.
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
  """Makes the program that returns sums and counts of zero.

  Args:
    mesh: the mesh of all devices.
    rows: the number of centers, padding included.
    dim: D.
  """
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
  """Makes the program that replaces some centers.

  The program takes centers [K, D], the numbers of some of them, and a new row
  for each number. It returns the new centers, which reuse the memory of the
  old. Numbers that are out of bounds are skipped.
  """
  return jax.jit(
    lambda c_KD, ids, new: c_KD.at[ids].set(new, mode='drop'),
    out_shardings=NamedSharding(mesh, sharding.CENTERS),
    donate_argnums=0,
  )


@functools.partial(jax.jit, static_argnums=1)
def lowest(score_n: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the `count` lowest scores and their places, the lowest first."""
  negative, place = lax.top_k(-score_n, count)
  return -negative, place
