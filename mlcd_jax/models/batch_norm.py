"""Batch normalisation that keeps its running averages among the parameters.

Gradients never change the running averages. `follow` updates them with the
statistics that the layers collected from a batch. So an encoder is one nested
dict for checkpoints, moving averages, shardings and conversion, and needs no
state besides its parameters.

Shapes: B images, H W positions, C channels.
"""

from collections.abc import Mapping
from typing import Any

import flax
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# The Linen collection that receives the means and variances of a batch.
STATISTICS = 'statistics'

# PyTorch's defaults, with which published ResNets were trained. The momentum is
# the weight of a new batch in the running averages.
_EPSILON = 1e-5
_MOMENTUM = 0.1


class BatchNorm(nn.Module):
  """Batch normalisation (Ioffe and Szegedy 2015) with float32 statistics.

  Attributes:
    dtype: the type of the result.
    scale_init: the initializer of the gain.
  """

  dtype: jnp.dtype
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(
    self, x_BHWC: jax.Array, weight_B: jax.Array | None = None
  ) -> jax.Array:
    """Normalises the channels of a batch of maps.

    Args:
      x_BHWC: maps of any float type.
      weight_B: in training, the weights of the images in the mean and variance
        of the batch, which spans all devices. None, or no positive weight,
        means that the running averages are used.

    Returns:
      [B, H, W, C] in `dtype`.
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
        # Keeps the last value; sow would collect a tuple.
        self.sow(STATISTICS, name, value, reduce_fn=lambda _, new: new)
    factor_C = scale_C * lax.rsqrt(variance_C + _EPSILON)
    y_BHWC = (x_BHWC - _as_BHWC(mean_C)) * _as_BHWC(factor_C)
    return (y_BHWC + _as_BHWC(bias_C)).astype(self.dtype)


def follow(
  params: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, Any]:
  """Updates the running averages with the statistics of a batch.

  Args:
    params: the parameters of a model.
    statistics: the collection STATISTICS of the batch; {} changes nothing.

  Returns:
    The parameters with new running averages.
  """
  flat = flax.traverse_util.flatten_dict(params)
  for path, value in flax.traverse_util.flatten_dict(statistics).items():
    flat[path] += _MOMENTUM * (value - flat[path])
  return flax.traverse_util.unflatten_dict(flat)


def _moments(
  x_BHWC: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weighted mean and variance [C], in one pass over the maps."""
  height, width = x_BHWC.shape[1:3]
  share_B = weight_B / (jnp.maximum(weight_B.sum(), 1) * height * width)
  share_B111 = share_B[:, None, None, None]
  mean_C = jnp.sum(x_BHWC * share_B111, axis=(0, 1, 2))
  square_C = jnp.sum(x_BHWC**2 * share_B111, axis=(0, 1, 2))
  # Rounding may make the variance of a constant channel negative.
  return mean_C, jnp.maximum(square_C - mean_C**2, 0)


def _as_BHWC(x_C: jax.Array) -> jax.Array:
  """Reshapes [C] to [1, 1, 1, C]."""
  return x_C[None, None, None]
