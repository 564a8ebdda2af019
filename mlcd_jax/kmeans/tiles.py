"""The shape of score tiles, the padding of centers and the type of scores.

A score is the product of a row and a center. Scores are computed for a tile of
some rows and some centers at a time.

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

# Rows and centers of a score tile. They do not depend on the mesh, so every
# mesh computes the same products. On CPUs products of bfloat16 are fastest with
# many centers (measured on Zen 5). Products of float32 are fastest if the
# scores of a tile stay in the cache: a pass with tiles of 256 x 4,096 takes
# 1.16 times as long as with 256 x 1,024 (Zen 3).
_CPU_TILE = {'bfloat16': (256, 4_096), 'float32': (256, 1_024)}
# The float32 scores of a tile take 32 MiB. Not tuned.
_ACCELERATOR_TILE = (4_096, 2_048)

# On CPUs the number of centers is padded to a multiple of this, since
# `nearest.py` cuts the centers into 256 buckets of the same size.
_CENTERS_MULTIPLE = 256


def score_dtype(mesh: Mesh) -> jnp.dtype:
  """Returns the type that rows and centers are rounded to for scoring.

  The type is bfloat16, or float32 on CPUs that cannot multiply bfloat16.
  """
  if sharding.on_cpu(mesh) and not _multiplies_bfloat16():
    return jnp.dtype(jnp.float32)
  return jnp.dtype(jnp.bfloat16)


@functools.cache
def _multiplies_bfloat16() -> bool:
  """Returns whether this machine's CPU has instructions to multiply bfloat16.

  With these instructions XLA's products of bfloat16 are twice as fast as those
  of float32 (Zen 5). Without them they are a third as fast (Zen 3). The answer
  comes from a file that only Linux has; on other systems it is False.
  """
  cpu = pathlib.Path('/proc/cpuinfo')
  flags = cpu.read_text().split() if cpu.exists() else []
  return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def tile_shape(mesh: Mesh, num_centers: int) -> tuple[int, int]:
  """Returns how many rows and how many centers a score tile has."""
  if not sharding.on_cpu(mesh):
    return _ACCELERATOR_TILE
  rows, centers = _CPU_TILE[score_dtype(mesh).name]
  return rows, min(centers, round_up(num_centers, _CENTERS_MULTIPLE))


def padded_centers(num_centers: int, mesh: Mesh) -> int:
  """Returns the number of centers with padding: whole tiles on each device."""
  tile = tile_shape(mesh, num_centers)[1]
  return round_up(num_centers, tile * mesh.shape['fsdp'])


def put_centers(centers: np.ndarray, mesh: Mesh) -> jax.Array:
  """Puts centers onto the devices.

  Args:
    centers: the centers [K, D]; every host has all of them.
    mesh: the mesh of all devices.

  Returns:
    float32 centers, padded with zero rows, sharded as sharding.CENTERS.
  """
  num_centers, dim = centers.shape
  padded = np.zeros((padded_centers(num_centers, mesh), dim), np.float32)
  padded[:num_centers] = centers
  return jax.make_array_from_callback(
    padded.shape,
    NamedSharding(mesh, sharding.CENTERS),
    lambda index: padded[index],
  )


def round_up(number: int, multiple: int) -> int:
  """Returns the smallest multiple of `multiple` that is at least `number`."""
  return -(-number // multiple) * multiple


def largest_divisor(number: int, limit: int) -> int:
  """Returns the largest divisor of `number` that is at most `limit`."""
  return next(d for d in range(min(number, limit), 0, -1) if not number % d)
