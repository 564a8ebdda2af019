"""Batch normalisation whose running averages lie among the parameters.

A gradient never moves the averages, `follow` does, with what the layers saw of
a batch. So an encoder stays one nested dict for checkpoints, averages,
shardings and conversion, and nothing else has a state.

Shapes: B images, H W positions, C channels.
"""

from collections.abc import Mapping
from typing import Any

import flax
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# The collection that a training batch's means and variances are found in.
STATISTICS = 'statistics'

_EPSILON = 1e-5  # PyTorch's, and so the published ResNets'.
_MOMENTUM = 0.1  # Share of a batch in the averages; PyTorch's.


class BatchNorm(nn.Module):
  """Normalises channels (Ioffe and Szegedy 2015), statistics in float32.

  Attributes:
    dtype: of the result.
    scale_init: of the gain.
  """

  dtype: jnp.dtype
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(
    self, x_BHWC: jax.Array, weight_B: jax.Array | None = None
  ) -> jax.Array:
    """[B, H, W, C] to the same.

    Args:
      x_BHWC: any float type.
      weight_B: in training, of the images, which are then normalised by their
        own mean and variance, those of the batch over all devices; otherwise,
        or if none weighs anything, by the running averages.
    """
    shape = x_BHWC.shape[-1:]
    scale_C = self.param('scale', self.scale_init, shape)
    bias_C = self.param('bias', nn.initializers.zeros, shape)
    mean_C = self.param('mean', nn.initializers.zeros, shape)
    variance_C = self.param('variance', nn.initializers.ones, shape)
    x_BHWC = x_BHWC.astype(jnp.float32)
    mean_C, variance_C = lax.stop_gradient((mean_C, variance_C))
    if weight_B is not None:
      some = jnp.any(weight_B > 0)
      found = _moments(x_BHWC, weight_B)
      mean_C = jnp.where(some, found[0], mean_C)
      variance_C = jnp.where(some, found[1], variance_C)
      for name, value in (('mean', mean_C), ('variance', variance_C)):
        self.sow(STATISTICS, name, value, reduce_fn=lambda _, new: new)
    factor_C = scale_C * lax.rsqrt(variance_C + _EPSILON)
    y_BHWC = (x_BHWC - _as_BHWC(mean_C)) * _as_BHWC(factor_C)
    return (y_BHWC + _as_BHWC(bias_C)).astype(self.dtype)


def follow(
  params: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns parameters whose running averages took in a batch.

  Args:
    params: of a model.
    statistics: the collection of that name; {} changes nothing.
  """
  flat = flax.traverse_util.flatten_dict(params)
  for path, value in flax.traverse_util.flatten_dict(statistics).items():
    flat[path] += _MOMENTUM * (value - flat[path])
  return flax.traverse_util.unflatten_dict(flat)


def _moments(
  x_BHWC: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and variance [C] in one pass over the images."""
  height, width = x_BHWC.shape[1:3]
  share_B = weight_B / (jnp.maximum(weight_B.sum(), 1) * height * width)
  share_B111 = share_B[:, None, None, None]
  mean_C = jnp.sum(x_BHWC * share_B111, axis=(0, 1, 2))
  square_C = jnp.sum(x_BHWC**2 * share_B111, axis=(0, 1, 2))
  # Rounding may leave a constant channel less than nothing.
  return mean_C, jnp.maximum(square_C - mean_C**2, 0)


def _as_BHWC(x_C: jax.Array) -> jax.Array:
  return x_C[None, None, None]
