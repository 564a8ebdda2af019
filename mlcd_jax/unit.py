"""Unit rows: rows scaled to length one, in NumPy and in JAX.

Shapes: N rows, D dimensions.
"""

from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Rows of a length (in JAX, a largest value) outside this range are divided by
# their largest value first. The squares of others have a normal float32 sum.
_SMALL = 1e-15
_LARGE = 1e15


class Rows(Protocol):
  """Rows [N, D] that can be read by slices: an array, or files read as one."""

  shape: tuple[int, int]

  def __getitem__(self, rows: slice) -> np.ndarray: ...


def unit_rows(rows: np.ndarray) -> np.ndarray:
  """Scales rows to length one.

  Args:
    rows: rows [..., D] of any number type.

  Returns:
    float32 rows of the same shape. A row that is zero or not finite becomes
    zero.
  """
  rows = np.asarray(rows, np.float32)
  with np.errstate(over='ignore'):
    norm = np.sqrt(np.square(rows).sum(-1, keepdims=True))
  # Squares of values above 1.8e19 or below 1e-23 leave the range of float32.
  extreme = (norm < _SMALL) | (norm > _LARGE)
  if extreme.any():
    peak = np.abs(rows).max(-1, keepdims=True)
    rows = rows / np.where(extreme & np.isfinite(peak) & (peak > 0), peak, 1)
    norm = np.sqrt(np.square(rows).sum(-1, keepdims=True))
  usable = np.isfinite(norm) & (norm > 0)
  return np.where(usable, rows / np.where(usable, norm, 1), 0)


def unit_rows_at(rows: Rows, indices: np.ndarray) -> np.ndarray:
  """Reads the rows with the given numbers and scales them as `unit_rows`."""
  return unit_rows(np.concatenate([rows[i : i + 1] for i in indices.tolist()]))


def unit_rows_jax(x_ND: jax.Array) -> jax.Array:
  """Does in JAX what `unit_rows` does in NumPy, up to rounding.

  Args:
    x_ND: rows of any float type.

  Returns:
    float32 rows [N, D]. A row that is zero or not finite becomes zero.
  """
  x_ND = x_ND.astype(jnp.float32)
  peak_N1 = jnp.max(jnp.abs(x_ND), axis=1, keepdims=True)
  extreme_N1 = (peak_N1 > _LARGE) | ((peak_N1 < _SMALL) & (peak_N1 > 0))
  x_ND = x_ND / jnp.where(jnp.isfinite(peak_N1) & extreme_N1, peak_N1, 1)
  square_N1 = jnp.sum(jnp.square(x_ND), axis=1, keepdims=True)
  usable_N1 = jnp.isfinite(square_N1) & (square_N1 > 0)
  scale_N1 = lax.rsqrt(jnp.where(usable_N1, square_N1, 1))
  return jnp.where(usable_N1, x_ND * scale_N1, 0)


def unit_embeddings(x_ND: jax.Array) -> jax.Array:
  """Scales the output [N, D] of an encoder to rows of length one.

  Unlike in `unit_rows_jax`, rows that are not finite stay so, since they show
  that the encoder is broken.
  """
  norm_N1 = jnp.linalg.norm(x_ND, axis=1, keepdims=True)
  return x_ND / jnp.maximum(norm_N1, jnp.finfo(jnp.float32).tiny)
