"""Contrastive losses of image-text pairs, split over every device.

The [B, B] logits never exist: each device has its own rows, a chunk of columns
at a time, and the backward pass computes them anew. Embeddings are gathered,
O(B D). Shapes: B pairs, D embedding, T pairs of a chunk; upper case is global,
lower case this device's part.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import sharding

LOSSES = ('softmax', 'sigmoid')

# Pairs of a chunk: a device's logits are [b, _CHUNK] at a time.
_CHUNK = 1_024


def make(
  name: str, mesh: Mesh, *, chunk: int = _CHUNK
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
  """Makes a loss of unit rows.

  Args:
    name: 'softmax', the mean of both directions' cross-entropy (CLIP, Radford
      et al. 2021, figure 3); or 'sigmoid', every pair of the batch on its own
      (SigLIP, Zhai et al. 2023, algorithm 1).
    mesh: whose devices all split the batch.
    chunk: T, columns of logits that exist at a time.

  Returns:
    (images [B, D], texts [B, D], scale, bias) -> mean loss of a pair; logits
    are scale times the cosine plus the bias, which softmax does not depend on.
  """
  local = {'softmax': _softmax, 'sigmoid': _sigmoid}[name]

  def loss(images_bD, texts_bD, scale, bias):
    part = local(images_bD, texts_bD, scale, bias, chunk)
    total = lax.psum(part, sharding.AXES)
    return total / (len(images_bD) * lax.axis_size(sharding.AXES))

  return jax.shard_map(
    loss,
    mesh=mesh,
    in_specs=(
      sharding.BATCH,
      sharding.BATCH,
      sharding.REPLICATED,
      sharding.REPLICATED,
    ),
    out_specs=sharding.REPLICATED,
  )


def _softmax(images_bD, texts_bD, scale, bias, chunk):
  """Sum of this device's cross-entropies, half of each direction's."""
  # One collective: two that do not depend on each other have no order.
  both_BE = _gathered(jnp.concatenate([images_bD, texts_bD], axis=1))
  images_BD, texts_BD = jnp.split(both_BE, 2, axis=1)
  over_columns = functools.partial(
    _over_columns,
    reduce=lambda logits_bT: jax.nn.logsumexp(logits_bT, axis=1),
    join=jnp.logaddexp,
    empty=-jnp.inf,
    scale=scale,
    bias=bias,
    chunk=chunk,
  )
  right_b = _right(images_bD, texts_bD, scale, bias)
  both_b = over_columns(images_bD, texts_BD) + over_columns(texts_bD, images_BD)
  return jnp.sum(both_b / 2 - right_b)


def _sigmoid(images_bD, texts_bD, scale, bias, chunk):
  """Sum of this device's rows; -log sigmoid(x) is softplus(x) - x."""
  all_b = _over_columns(
    images_bD,
    _gathered(texts_bD),
    reduce=lambda logits_bT: jnp.sum(jax.nn.softplus(logits_bT), axis=1),
    join=jnp.add,
    empty=0.0,
    scale=scale,
    bias=bias,
    chunk=chunk,
  )
  return jnp.sum(all_b - _right(images_bD, texts_bD, scale, bias))


def _right(images_bD, texts_bD, scale, bias):
  """Logits [b] of what belongs together."""
  return scale * jnp.sum(images_bD * texts_bD, axis=1) + bias


def _gathered(x_bD):
  return lax.all_gather(x_bD, sharding.AXES, tiled=True)


def _over_columns(x_bD, y_BD, *, reduce, join, empty, scale, bias, chunk):
  """Reduces logits [b, B] of own rows and everybody's columns to [b]."""
  num = len(y_BD)
  chunk = min(chunk, num)
  starts = jnp.arange(0, num, chunk)
  y_BD = jnp.pad(y_BD, [(0, -num % chunk), (0, 0)])

  @jax.checkpoint
  def add(carry_b, start_and_chunk):
    start, y_TD = start_and_chunk
    logits_bT = scale * (x_bD @ y_TD.T) + bias
    # Padding is a logit that adds nothing to either loss.
    exists_T = start + jnp.arange(chunk) < num
    logits_bT = jnp.where(exists_T[None], logits_bT, -jnp.inf)
    return join(carry_b, reduce(logits_bT)), None

  empty_b = lax.pcast(
    jnp.full(len(x_bD), empty, x_bD.dtype), sharding.AXES, to='varying'
  )
  chunks = y_BD.reshape(-1, chunk, y_BD.shape[1])
  return lax.scan(add, empty_b, (starts, chunks))[0]
