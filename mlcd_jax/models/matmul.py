"""Matrix products in low precision with float32 accumulation, also backward."""

import functools

import jax
from jax import lax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_MK: jax.Array, y_KN: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns x @ y, float32 [M, N].

  The operands are rounded to `dtype`. The backward pass also rounds the
  cotangent, as automatic mixed precision does. Otherwise its products would mix
  types, which no matrix unit computes at full rate. Each gradient has the type
  of its operand.

  Args:
    x_MK: the left operand, any float type.
    y_KN: the right operand, any float type.
    dtype: the type to which the operands are rounded.
  """
  return _dot(x_MK.astype(dtype), y_KN.astype(dtype), 1, 0)


def _forward(x_MK, y_KN, dtype):
  """Returns the product and the rounded operands as residuals."""
  x, y = x_MK.astype(dtype), y_KN.astype(dtype)
  # Empty arrays carry the original types to the backward pass.
  types = jnp.zeros((0,), x_MK.dtype), jnp.zeros((0,), y_KN.dtype)
  return _dot(x, y, 1, 0), (x, y, types)


def _backward(dtype, residuals, g_MN):
  """Returns g y^T and x^T g."""
  x, y, (x_like, y_like) = residuals
  g_MN = g_MN.astype(dtype)
  return (
    _dot(g_MN, y, 1, 1).astype(x_like.dtype),
    _dot(x, g_MN, 0, 0).astype(y_like.dtype),
  )


def _dot(x, y, x_axis, y_axis):
  """Contracts one axis of x with one of y, accumulating in float32."""
  return lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


matmul.defvjp(_forward, _backward)
