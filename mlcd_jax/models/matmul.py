"""Matrix products in one type that accumulate in float32, both ways."""

import functools

import jax
from jax import lax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_MK: jax.Array, y_KN: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns x @ y, float32 [M, N].

  The operands are rounded to `dtype` and so is the cotangent in the backward
  pass, as with automatic mixed precision: without it the transposed products
  would mix types, which no matrix unit computes at its full rate. The
  gradients are float32 where the operands are.

  Args:
    x_MK: any float type.
    y_KN: any float type.
    dtype: of the operands.
  """
  return _dot(x_MK.astype(dtype), y_KN.astype(dtype), 1, 0)


def _forward(x_MK, y_KN, dtype):
  x, y = x_MK.astype(dtype), y_KN.astype(dtype)
  # Empty arrays tell the backward pass the operands' own types.
  types = jnp.zeros((0,), x_MK.dtype), jnp.zeros((0,), y_KN.dtype)
  return _dot(x, y, 1, 0), (x, y, types)


def _backward(dtype, residuals, g_MN):
  x, y, (x_like, y_like) = residuals
  g_MN = g_MN.astype(dtype)
  return (
    _dot(g_MN, y, 1, 1).astype(x_like.dtype),
    _dot(x, g_MN, 0, 0).astype(y_like.dtype),
  )


def _dot(x, y, x_axis, y_axis):
  """Contracts one axis of each."""
  return lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


matmul.defvjp(_forward, _backward)
