"""Contrastive losses of image-text pairs, split over every device.

The [B, B] logits never exist as one array. Every device gathers all embeddings,
[B, D], and computes the logits of its own rows one chunk of columns at a time.
The backward pass computes each chunk again instead of storing it.

Shapes: B pairs, D embedding, T pairs in a chunk. Upper case is global, lower
case this device's part.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlcd_jax import sharding

LOSSES = ('softmax', 'sigmoid')

# Columns of logits that a device holds at a time: 4 KiB of float32 per row.
_CHUNK = 1_024


def make(
  name: str, mesh: Mesh, *, chunk: int = _CHUNK
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
  """Makes a contrastive loss for unit rows.

  Args:
    name: 'softmax' for the mean cross-entropy of both directions (CLIP, Radford
      et al. 2021, figure 3), or 'sigmoid' for a binary loss on each of the
      B * B combinations (SigLIP, Zhai et al. 2023, algorithm 1).
    mesh: the mesh of all devices; they split the batch.
    chunk: T, the number of columns of logits that exist at a time.

  Returns:
    A function (images [B, D], texts [B, D], scale, bias) -> loss, averaged
    over the pairs. Logits are scale * cosine + bias. The bias does not change
    the softmax loss.
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
  """Returns the sum over this device's rows of both directions' mean loss."""
  # Images and texts are gathered in one collective. Two independent ones could
  # run in a different order on each device and deadlock.
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
  """Returns the sum of this device's rows of the sigmoid loss.

  A negative costs -log sigmoid(-x) = softplus(x), and a positive
  -log sigmoid(x) = softplus(x) - x. So every logit adds its softplus, and the
  positives' logits are subtracted once.
  """
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
  """Returns the logits [b] of the matching pairs."""
  return scale * jnp.sum(images_bD * texts_bD, axis=1) + bias


def _gathered(x_bD):
  """Gathers the rows of all devices into [B, D]."""
  return lax.all_gather(x_bD, sharding.AXES, tiled=True)


def _over_columns(x_bD, y_BD, *, reduce, join, empty, scale, bias, chunk):
  """Reduces the logits [b, B] of this device's rows to [b], chunk by chunk.

  Args:
    x_bD: this device's rows.
    y_BD: the rows of all devices, which are the columns of the logits.
    reduce: logits [b, T] of a chunk -> [b].
    join: combines two results [b] of `reduce`.
    empty: the result of no columns.
    scale: the factor of the cosine.
    bias: the number added to every logit.
    chunk: T.
  """
  num = len(y_BD)
  chunk = min(chunk, num)
  starts = jnp.arange(0, num, chunk)
  y_BD = jnp.pad(y_BD, [(0, -num % chunk), (0, 0)])

  # Without checkpoint the scan would store all [b, B] logits for the gradient.
  @jax.checkpoint
  def add(carry_b, start_and_chunk):
    start, y_TD = start_and_chunk
    logits_bT = scale * (x_bD @ y_TD.T) + bias
    # The last chunk is padded. A logit of -inf adds 0 to logsumexp and to the
    # sum of softplus.
    exists_T = start + jnp.arange(chunk) < num
    logits_bT = jnp.where(exists_T[None], logits_bT, -jnp.inf)
    return join(carry_b, reduce(logits_bT)), None

  # The carry differs between devices from the first chunk on; shard_map wants
  # its type to say so from the start.
  empty_b = lax.pcast(
    jnp.full(len(x_bD), empty, x_bD.dtype), sharding.AXES, to='varying'
  )
  chunks = y_BD.reshape(-1, chunk, y_BD.shape[1])
  return lax.scan(add, empty_b, (starts, chunks))[0]
