"""Sums that one pass hands to the next, on the devices and in a saved state.

Shapes: K centers, D dimensions. Upper case is global, lower case this device's
part.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding
from mlcd_jax.kmeans import passes
from mlcd_jax.kmeans import tiles


def merge(sums: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds the sums and counts of all parts of the mesh into the first part.

  A saved state has no parts. Merging before every pass, saved or not, gives a
  run that was stopped the same bits as one that was not.
  """
  return _make_merge(sums.sharding.mesh)(sums, counts)


@functools.cache
def _make_merge(mesh: Mesh) -> Callable:
  def merge_parts(sums_1kD, counts_1k):
    first = lax.axis_index('data') == 0
    return tuple(
      jnp.where(first, lax.psum(x, 'data'), 0) for x in (sums_1kD, counts_1k)
    )

  specs = passes.SUMS, passes.SUMS
  return passes.on_mesh(merge_parts, mesh, specs, specs)


def to_devices(
  sums: np.ndarray, counts: np.ndarray, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Puts sums [K, D] and counts [K] into the first part, the others zero."""
  rows = tiles.padded_centers(len(counts), mesh)

  def put(x):
    padded = np.zeros((rows, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x

    def block(index):
      part = padded[index[1:]][None]
      return part if index[0].indices(rows)[0] == 0 else np.zeros_like(part)

    return jax.make_array_from_callback(
      (mesh.shape['data'], *padded.shape),
      NamedSharding(mesh, passes.SUMS),
      block,
    )

  return put(sums), put(counts)


def to_host(
  sums: jax.Array, counts: jax.Array, num_centers: int
) -> tuple[np.ndarray, np.ndarray]:
  """Fetches sums [K, D] and counts [K] of all parts, without padding."""
  total = _make_total(sums.sharding.mesh)(sums, counts)
  return tuple(sharding.to_host(x)[:num_centers] for x in total)


@functools.cache
def _make_total(mesh: Mesh) -> Callable:
  return passes.on_mesh(
    lambda sums_1kD, counts_1k: lax.psum((sums_1kD[0], counts_1k[0]), 'data'),
    mesh,
    (passes.SUMS, passes.SUMS),
    (sharding.CENTERS, sharding.CENTERS),
  )
