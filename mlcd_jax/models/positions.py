"""Positions of tokens: interpolated tables and 2-D rotations.

Shapes: B images, N heads, L tokens, K width of a head, D width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# The base of rotary frequencies (Su et al. 2021, section 3.3), which MLCD and
# RICE keep.
_BASE = 10_000.0

# The cubic kernel's free parameter by `antialias`. torch's bicubic uses -0.75,
# but -0.5 (Keys 1981, as Pillow) when it antialiases.
_CUBIC = {False: -0.75, True: -0.5}


def interpolate(
  table_LD: jax.Array,
  grid: tuple[int, int],
  own_grid: tuple[int, int],
  *,
  extra: int,
  antialias: bool = False,
) -> jax.Array:
  """Interpolates a table of positions to another grid of patches.

  The method is that of torch.nn.functional.interpolate with mode='bicubic' and
  align_corners=False, which `transformers` uses for all families here.

  Args:
    table_LD: the positions of the extra tokens, then of the patches row by row.
    grid: (rows, columns) of the result.
    own_grid: (rows, columns) of the table.
    extra: the number of tokens before the patches; they keep their positions.
    antialias: use torch's antialiased kernel, which widens as the grid shrinks.

  Returns:
    The table [extra + rows * columns, D].
  """
  if tuple(own_grid) == tuple(grid):
    return table_LD
  width = table_LD.shape[1]
  patches = table_LD[extra:].reshape(*own_grid, width)
  rows, columns = (
    jnp.asarray(_cubic_weights(old, new, antialias))
    for old, new in zip(own_grid, grid)
  )
  patches = jnp.einsum(
    'yh,hwD,xw->yxD', rows, patches, columns, precision='highest'
  )
  return jnp.concatenate([table_LD[:extra], patches.reshape(-1, width)])


def rotations(
  grid: tuple[int, int], head_dim: int, class_angles: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines [L, K] of 2-D rotary positions.

  The angles of the first quarter of a head depend on the row, those of the
  second on the column. The second half repeats the first (`transformers`,
  models/mlcd/modular_mlcd.py).

  Args:
    grid: (rows, columns) of patches.
    head_dim: K, a multiple of 4.
    class_angles: the angles [1, K / 2] of a class token before the patches;
      None without one.
  """
  half = head_dim // 2
  frequencies = 1 / _BASE ** (np.arange(0, half, 2, dtype=np.float32) / half)
  y, x = np.indices(grid, dtype=np.float32).reshape(2, -1, 1)
  angles = jnp.asarray(
    np.concatenate([y * frequencies[None], x * frequencies[None]], axis=1)
  )
  if class_angles is not None:
    angles = jnp.concatenate([class_angles, angles])
  angles = jnp.concatenate([angles, angles], axis=1)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x_BNLK: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates queries or keys in float32 and returns them in their own type.

  Args:
    x_BNLK: queries or keys.
    rotation: cosines and sines [L, K], the result of `rotations`.
  """
  cos, sin = (table[None, None] for table in rotation)
  x = x_BNLK.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x * cos + turned * sin).astype(x_BNLK.dtype)


def _cubic_weights(old: int, new: int, antialias: bool) -> np.ndarray:
  """Returns float32 weights [new, old] of a cubic resize along one axis."""
  a = _CUBIC[antialias]
  scale = old / new
  stretch = max(scale, 1.0) if antialias else 1.0
  # Half a pixel is align_corners=False: pixel centers, not corners, are mapped.
  centers = (np.arange(new) + 0.5) * scale - 0.5
  reach = math.ceil(2 * stretch) + 1
  taps = np.floor(centers)[:, None] + np.arange(-reach, reach + 1)[None]
  d = np.abs(taps - centers[:, None]) / stretch
  near = ((a + 2) * d - (a + 3)) * d**2 + 1
  far = a * (((d - 5) * d + 8) * d - 4)
  values = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
  # Like torch, drop taps outside the table when antialiasing; otherwise they
  # repeat the edge, by np.clip below.
  if antialias:
    values = np.where((taps >= 0) & (taps < old), values, 0.0)
    values /= values.sum(1, keepdims=True)
  weights = np.zeros((new, old))
  columns = np.clip(taps, 0, old - 1).astype(int)
  np.add.at(weights, (np.arange(new)[:, None], columns), values)
  return weights.astype(np.float32)
