"""Sums of a k-means pass that the next one starts from, and saves.

Shapes: K centers, D dimensions. Upper case is global, lower case this
device's part.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import nearest
from mlcd_jax import sharding


class Sums(NamedTuple):
  """What the points of a pass came to, which a quick next pass starts from.

  Attributes:
    sums: float32 [K, D], of the points, by center.
    counts: int32 [K].
  """

  sums: np.ndarray
  counts: np.ndarray


def merged(sums: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums and counts with those of all parts of the mesh in the first."""
  return _make_merged(sums.sharding.mesh)(sums, counts)


@functools.cache
def _make_merged(mesh: Mesh):
  def merge(sums_1kD, counts_1k):
    first = lax.axis_index('data') == 0
    return tuple(
      jnp.where(first, lax.psum(x, 'data'), 0) for x in (sums_1kD, counts_1k)
    )

  specs = nearest.SUMS, nearest.SUMS
  return jax.jit(
    jax.shard_map(
      merge, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
  )


def to_devices(carried: Sums, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """Sums [data, K, D] and counts [data, K], padded."""
  rows = nearest.padded_centers(len(carried.counts), mesh)

  def put(x):
    padded = np.zeros((rows, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x

    def block(index):  # All of it lies in the first of the mesh's parts.
      held = padded[index[1:]][None]
      return held if index[0].indices(rows)[0] == 0 else np.zeros_like(held)

    return jax.make_array_from_callback(
      (mesh.shape['data'], *padded.shape),
      NamedSharding(mesh, nearest.SUMS),
      block,
    )

  return put(carried.sums), put(carried.counts)


def to_host(sums: jax.Array, counts: jax.Array, num_centers: int) -> Sums:
  """Sums [K, D] and counts [K] over all parts of the mesh, without padding."""
  total = _make_total(sums.sharding.mesh)(sums, counts)
  return Sums(*(nearest.to_host(x)[:num_centers] for x in total))


@functools.cache
def _make_total(mesh: Mesh):
  return jax.jit(
    jax.shard_map(
      lambda sums_1kD, counts_1k: lax.psum((sums_1kD[0], counts_1k[0]), 'data'),
      mesh=mesh,
      in_specs=(nearest.SUMS, nearest.SUMS),
      out_specs=(sharding.CENTERS, sharding.CENTERS),
      check_vma=False,
    )
  )
