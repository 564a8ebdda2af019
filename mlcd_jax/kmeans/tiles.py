"""Shapes of score tiles, padding of the centers, and the type of the scores.

Shapes: K centers, D dimensions.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding

# Rows and centers of a score tile. They do not depend on the mesh, so that
# products are computed alike everywhere. On a CPU products of bfloat16 are
# fastest with many centers (measured on Zen 5), those of float32 where a tile's
# scores stay in the cache: 256 x 1,024 take 1 / 1.16 of the time of 256 x 4,096
# (Zen 3).
_CPU_TILE = {'bfloat16': (256, 4_096), 'float32': (256, 1_024)}
# Its scores take 32 MiB. Not tuned.
_ACCELERATOR_TILE = (4_096, 2_048)

# `nearest.py` on CPUs cuts the centers into as many buckets.
_CENTERS_MULTIPLE = 256


def score_dtype(mesh: Mesh) -> jnp.dtype:
  """Returns the type to which the operands of scores are rounded.

  It is bfloat16, or float32 on CPUs without products of bfloat16.
  """
  if sharding.on_cpu(mesh) and not _multiplies_bfloat16():
    return jnp.dtype(jnp.float32)
  return jnp.dtype(jnp.bfloat16)


@functools.cache
def _multiplies_bfloat16() -> bool:
  """Returns whether this machine's processor has products of bfloat16.

  With them XLA's products are twice as fast as in float32 (Zen 5), without
  them a third as fast (Zen 3). Only Linux says so; elsewhere the answer is no.
  """
  cpu = pathlib.Path('/proc/cpuinfo')
  flags = cpu.read_text().split() if cpu.exists() else []
  return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def tile_shape(mesh: Mesh, num_centers: int) -> tuple[int, int]:
  """Returns the number of rows and of centers of a score tile."""
  if not sharding.on_cpu(mesh):
    return _ACCELERATOR_TILE
  rows, centers = _CPU_TILE[score_dtype(mesh).name]
  return rows, min(centers, round_up(num_centers, _CENTERS_MULTIPLE))


def padded_centers(num_centers: int, mesh: Mesh) -> int:
  """Returns the number of centers on the devices, padding included."""
  tile = tile_shape(mesh, num_centers)[1]
  return round_up(num_centers, tile * mesh.shape['fsdp'])


def put_centers(centers: np.ndarray, mesh: Mesh) -> jax.Array:
  """Puts centers onto the devices, padded with zero rows to whole tiles."""
  num_centers, dim = centers.shape
  padded = np.zeros((padded_centers(num_centers, mesh), dim), np.float32)
  padded[:num_centers] = centers
  return jax.make_array_from_callback(
    padded.shape,
    NamedSharding(mesh, sharding.CENTERS),
    lambda index: padded[index],
  )


def round_up(number: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below a number."""
  return -(-number // multiple) * multiple


def largest_divisor(number: int, limit: int) -> int:
  """Returns the largest divisor of a number that is not above a limit."""
  return next(d for d in range(min(number, limit), 0, -1) if not number % d)
