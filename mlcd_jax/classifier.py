"""Class centers sharded over every device, and the loss against them.

As in PartialFC every device owns a share of the classes. Embeddings and
labels are gathered, which costs O(B D), while the weights and their gradients,
O(C D), never leave their device. Negatives are one subset of the classes a
step, shared by the batch; an image's own positives are computed apart and
masked out of it.

Classes are dealt to blocks of rows in turn, so that every block, and so every
device, has as many classes as any other, and neighbouring (say, popular)
clusters are spread over all of them.

Shapes: B images, D dimensions, C classes padded to whole blocks, P positives,
S sampled classes. Upper case is global, lower case this device's part.
"""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import losses
from mlcd_jax import sharding

# The paper's code family draws them from N(0, 0.01) (unicom/partial_fc.py).
_INIT_STDDEV = 0.01

# Bytes of one chunk of float32 logits on a device.
_CHUNK_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where classes lie in the weight, whatever the mesh.

  Attributes:
    num_classes: without padding.
    blocks: the rows are divided into so many equal blocks. Negatives are drawn
      block by block, so that every mesh draws the same ones; devices divide
      the blocks evenly, so this is also the most devices there can be.
  """

  num_classes: int

  @property
  def blocks(self) -> int:
    """Equal blocks of rows."""
    return 8_192 if self.num_classes > 2**19 else 1_024

  @property
  def rows_per_block(self) -> int:
    """The most classes a block can have."""
    return -(-self.num_classes // self.blocks)

  @property
  def rows(self) -> int:
    """Rows of the weight, padding included."""
    return self.blocks * self.rows_per_block

  def row_of(self, classes: jax.Array) -> jax.Array:
    """Row of the weight that holds a class; -1 stays -1."""
    block, place = classes % self.blocks, classes // self.blocks
    return jnp.where(classes >= 0, block * self.rows_per_block + place, -1)

  def class_of(self, rows: jax.Array) -> jax.Array:
    """Inverse of `row_of`; padding gives classes past the last."""
    block, place = rows // self.rows_per_block, rows % self.rows_per_block
    return place * self.blocks + block

  def block_sizes(self) -> np.ndarray:
    """Classes of each block, without padding."""
    first = np.arange(self.blocks)
    return -(-(self.num_classes - first) // self.blocks)


def init(key: jax.Array, num_classes: int, dim: int) -> dict[str, jax.Array]:
  """Returns {"weight": float32 [C, D]}."""
  shape = (Layout(num_classes).rows, dim)
  return {'weight': _INIT_STDDEV * jax.random.normal(key, shape)}


def loss(
  weight_CD: jax.Array,
  embeddings_BD: jax.Array,
  labels_BP: jax.Array,
  *,
  num_classes: int,
  config: ml_collections.ConfigDict,
  dtype: jnp.dtype,
  key: jax.Array,
  mesh: Mesh,
) -> jax.Array:
  """Returns the loss of every image, float32 [B].

  Args:
    weight_CD: class centers, normalised here; sharded as sharding.CLASSES.
    embeddings_BD: normalised here; sharded as sharding.BATCH.
    labels_BP: int32 classes, -1 where there is none; repeats count once.
    num_classes: classes without the padding.
    config: the `loss` fields.
    dtype: of the products' operands; they accumulate in float32.
    key: draws the negatives; the same on every device.
    mesh: of all devices.
  """
  layout = Layout(num_classes)
  num_sampled = max(1, round(config.sample_rate * num_classes))

  def local(w_cD, e_bD, labels_bP, key):
    e_BD = lax.all_gather(_unit(e_bD), sharding.AXES, tiled=True)
    labels_BP = lax.all_gather(labels_bP, sharding.AXES, tiled=True)
    rows_BP = layout.row_of(_without_repeats(labels_BP))
    first = lax.axis_index(sharding.AXES) * w_cD.shape[0]
    if num_sampled == num_classes:
      sampled_s = jnp.arange(w_cD.shape[0])
      drawn_s = layout.class_of(first + sampled_s) < num_classes
      w_sD = _unit(w_cD)
    else:
      sampled_s, drawn_s = _draw(
        key, layout, num_sampled, first=first, num_local=w_cD.shape[0]
      )
      w_sD = _unit(w_cD[sampled_s])
    statistics = functools.partial(
      _statistics,
      w_cD=w_cD,
      w_sD=w_sD.astype(dtype),
      negative_s=jnp.where(drawn_s, first + sampled_s, -1),
      first=first,
      scale=config.scale,
    )
    negatives_B, cosines_BP = _in_chunks(
      statistics, e_BD, rows_BP, bytes_per_row=4 * w_sD.shape[0]
    )
    # Each positive lives on one device; the others add zero.
    cosines_BP = lax.psum(cosines_BP, sharding.AXES)
    positives_BP = jnp.where(
      rows_BP >= 0, config.scale * (cosines_BP - config.margin), jnp.inf
    )
    loss_B = losses.from_reduced(
      config.name,
      positives_BP,
      losses.merge_log_sum_exp(negatives_B, sharding.AXES),
    )
    b = e_bD.shape[0]
    return lax.dynamic_slice_in_dim(
      loss_B, lax.axis_index(sharding.AXES) * b, b
    )

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      sharding.CLASSES,
      sharding.BATCH,
      sharding.BATCH,
      sharding.REPLICATED,
    ),
    out_specs=sharding.BATCH,
  )(weight_CD, embeddings_BD, labels_BP, key)


def _unit(x: jax.Array) -> jax.Array:
  """Unit rows in float32; zero rows stay zero."""
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _without_repeats(labels_BP: jax.Array) -> jax.Array:
  """A label that stands further left already becomes -1."""
  same = labels_BP[:, :, None] == labels_BP[:, None, :]
  earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
  return jnp.where(jnp.any(same & earlier[None], axis=-1), -1, labels_BP)


def _draw(key, layout, num_sampled, *, first, num_local):
  """Draws this device's share of the step's classes, without repeats.

  How many come from a block follows a random offset (systematic sampling), so
  that exactly `num_sampled` classes are drawn and each with the same
  probability; which ones, random priorities.

  Returns:
    local rows int32 [s], and which of them are drawn, bool [s]; the rest
    fills up s, the most a device can have.
  """
  offset_key, key = jax.random.split(key)
  quota = _quotas(offset_key, layout, num_sampled)
  blocks = first // layout.rows_per_block
  blocks = blocks + jnp.arange(num_local // layout.rows_per_block)
  priority = jax.vmap(
    lambda block: jax.random.uniform(
      jax.random.fold_in(key, block), (layout.rows_per_block,)
    )
  )(blocks)
  is_class = layout.class_of(first + jnp.arange(num_local))
  is_class = (is_class < layout.num_classes).reshape(priority.shape)
  priority = jnp.where(is_class, priority, -1.0)
  # Two sorts rank the block's rows; the first of equals ranks higher.
  rank = jnp.argsort(jnp.argsort(-priority, axis=1), axis=1)
  drawn = (rank < quota[blocks][:, None]).reshape(-1)
  most = -(-num_sampled * layout.block_sizes().max() // layout.num_classes)
  capacity = min(num_local, int(most) * len(blocks))
  rows = jnp.nonzero(drawn, size=capacity, fill_value=num_local)[0]
  return jnp.minimum(rows, num_local - 1), rows < num_local


def _quotas(key, layout, num_sampled):
  """How many classes to draw from each block, int32 [blocks].

  The running share of block b, num_sampled * classes before b / num_classes,
  is shifted by one random offset and rounded down.
  """
  before = np.concatenate([[0], np.cumsum(layout.block_sizes())])
  whole, rest = np.divmod(before * num_sampled, layout.num_classes)
  offset = jax.random.randint(key, (), 0, layout.num_classes)
  rounded = whole.astype(np.int32) + (
    rest.astype(np.int32) >= layout.num_classes - offset
  )
  return rounded[1:] - rounded[:-1]


def _statistics(e_BD, rows_BP, *, w_cD, w_sD, negative_s, first, scale):
  """What this device knows of a chunk of images.

  Returns:
    log-sum-exp of its negatives' logits, [B], and the cosines of those
    positives that it owns, [B, P], zero for the others.
  """
  logits_Bs = scale * lax.dot_general(
    e_BD.astype(w_sD.dtype),
    w_sD,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  masked_Bs = (negative_s < 0)[None]
  for p in range(rows_BP.shape[1]):  # One fused comparison, no [B, s, P].
    masked_Bs = masked_Bs | (rows_BP[:, p, None] == negative_s[None])
  negatives_B = losses.log_sum_exp(jnp.where(masked_Bs, -jnp.inf, logits_Bs))

  local_BP = rows_BP - first
  owned_BP = (rows_BP >= 0) & (local_BP >= 0) & (local_BP < w_cD.shape[0])
  w_BPD = _unit(w_cD[jnp.where(owned_BP, local_BP, 0)])
  cosines_BP = jnp.sum(e_BD[:, None, :] * w_BPD, axis=-1)
  return negatives_B, jnp.where(owned_BP, cosines_BP, 0)


def _in_chunks(statistics, e_BD, rows_BP, *, bytes_per_row):
  """Maps over chunks of images and recomputes them in the backward pass.

  The [B, s] logits then never exist, only [chunk, s].
  """
  num_images = e_BD.shape[0]
  most = max(1, _CHUNK_BYTES // bytes_per_row)
  if num_images <= most:
    return statistics(e_BD, rows_BP)
  chunk = next(n for n in range(most, 0, -1) if num_images % n == 0)
  negatives, cosines = lax.map(
    jax.checkpoint(lambda xs: statistics(*xs)),
    (
      e_BD.reshape(-1, chunk, e_BD.shape[1]),
      rows_BP.reshape(-1, chunk, rows_BP.shape[1]),
    ),
  )
  return negatives.reshape(-1), cosines.reshape(num_images, -1)
