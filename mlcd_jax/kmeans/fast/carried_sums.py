"""The sums of one pass as the start of the next one.

A quick pass does not sum up all rows again. It takes the sums of the pass
before and moves the rows whose label changed. These functions carry the sums
over, on the devices and through a saved state.

On the devices, sums are [data, K, D] and counts [data, K]: each part of the
mesh axis "data" has the sums of its own rows. A part here is an index of that
axis.

Shapes: K centers, D dimensions. Upper case is global, lower case this device's
part; a 1 stands for the device's part of the axis "data".
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
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import tiles


def merge(sums: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds the sums and counts of all parts into the first part.

  The other parts become zero. A saved state has the sums of all parts together.
  Merging after every pass, saved or not, gives a run that was stopped the same
  bits as one that was not.
  """
  return _make_merge(sums.sharding.mesh)(sums, counts)


@functools.cache
def _make_merge(mesh: Mesh) -> Callable:
  """Makes the program of `merge`."""

  def merge_parts(sums_1kD, counts_1k):
    first = lax.axis_index('data') == 0
    return tuple(
      jnp.where(first, lax.psum(x, 'data'), 0) for x in (sums_1kD, counts_1k)
    )

  specs = programs.SUMS, programs.SUMS
  return programs.on_mesh(merge_parts, mesh, specs, specs)


def to_devices(
  sums: np.ndarray, counts: np.ndarray, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Puts saved sums and counts onto the devices.

  Args:
    sums: the sums [K, D] of all rows.
    counts: the counts [K] of all rows.
    mesh: the mesh of all devices.

  Returns:
    Sums [data, K, D] and counts [data, K], padded, sharded as programs.SUMS.
    The first part has the values, the others are zero, as after `merge`.
  """
  rows = tiles.padded_centers(len(counts), mesh)

  def put(x):
    padded = np.zeros((rows, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x

    def block(index):  # The first index is the part of the axis "data".
      part = padded[index[1:]][None]
      return part if index[0].indices(rows)[0] == 0 else np.zeros_like(part)

    return jax.make_array_from_callback(
      (mesh.shape['data'], *padded.shape),
      NamedSharding(mesh, programs.SUMS),
      block,
    )

  return put(sums), put(counts)


def to_host(
  sums: jax.Array, counts: jax.Array, num_centers: int
) -> tuple[np.ndarray, np.ndarray]:
  """Copies the sums and counts of all parts together to every host.

  Returns:
    Sums [K, D] and counts [K] without padding.
  """
  total = _make_total(sums.sharding.mesh)(sums, counts)
  return tuple(sharding.to_host(x)[:num_centers] for x in total)


@functools.cache
def _make_total(mesh: Mesh) -> Callable:
  """Makes the program that takes sums and counts and adds up their parts."""
  return programs.on_mesh(
    lambda sums_1kD, counts_1k: lax.psum((sums_1kD[0], counts_1k[0]), 'data'),
    mesh,
    (programs.SUMS, programs.SUMS),
    (sharding.CENTERS, sharding.CENTERS),
  )
