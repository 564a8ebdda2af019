"""Where classes lie in the classifier's weight, and which ones a step draws.

Classes are dealt to blocks of rows in turn, so that every block, and so every
device, has as many classes as any other. Blocks take turns in bit-reversed
order, so that neighbouring (say, popular) clusters come to lie on different
devices. Negatives are drawn block by block from the block's own random
numbers, so that every mesh draws the same ones.

Shapes: B images, C classes padded to whole blocks, P positives. Upper case is
global, lower case this device's part.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import ml_collections
import numpy as np

MODES = ('uniform', 'partial_fc')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where classes lie in the weight, whatever the mesh.

  Attributes:
    num_classes: without padding.
  """

  num_classes: int

  @property
  def blocks(self) -> int:
    """Equal blocks of rows; a device owns whole ones, so it is the most."""
    return 8_192 if self.num_classes > 2**19 else 1_024

  @property
  def rows_per_block(self) -> int:
    """The most classes a block can have."""
    return -(-self.num_classes // self.blocks)

  @property
  def rows(self) -> int:
    """Rows of all blocks, padding included."""
    return self.blocks * self.rows_per_block

  def rows_over(self, num_devices: int) -> int:
    """Rows of the weight: whole blocks, and as many of them on each device.

    Where the devices do not divide the blocks, empty ones at the end make up
    for it. They are part of the array alone: nothing is drawn from them, and
    another mesh has fewer or more.
    """
    return -(-self.blocks // num_devices) * num_devices * self.rows_per_block

  def row_of(self, classes: jax.Array) -> jax.Array:
    """Row of the weight that holds a class; -1 stays -1."""
    block = jnp.asarray(self._turns)[classes % self.blocks]
    place = classes // self.blocks
    return jnp.where(classes >= 0, block * self.rows_per_block + place, -1)

  def class_of(self, rows: jax.Array) -> jax.Array:
    """Inverse of `row_of`; padding gives classes past the last."""
    block, place = rows // self.rows_per_block, rows % self.rows_per_block
    turn = jnp.asarray(self._turns).at[block].get(mode='clip')
    return jnp.where(block < self.blocks, place * self.blocks + turn, self.rows)

  def block_sizes(self) -> np.ndarray:
    """Classes of each block, without padding."""
    return -(-(self.num_classes - self._turns) // self.blocks)

  @property
  def _turns(self) -> np.ndarray:
    """Bit-reversed numbers below `blocks`; its own inverse."""
    turns = np.zeros(1, np.int32)
    while len(turns) < self.blocks:
      turns = np.concatenate([2 * turns, 2 * turns + 1])
    return turns


def num_sampled(config: ml_collections.ConfigDict, num_classes: int) -> int:
  """Classes drawn a step: loss.sample_rate of all, at least one."""
  return max(1, round(config.sample_rate * num_classes))


def draw(
  key: jax.Array,
  layout: Layout,
  rows_BP: jax.Array,
  *,
  config: ml_collections.ConfigDict,
  first: jax.Array,
  num_local: int,
) -> jax.Array:
  """Draws this device's share of the step's classes.

  `uniform` draws exactly `num_sampled` classes, each with the same
  probability. `partial_fc` puts the positives of the whole batch in first and
  fills up with others, as PartialFC does on each of its devices; here on each
  block. A block with more positives than its share keeps them all.

  Args:
    key: the same on every device.
    layout: of the classes.
    rows_BP: the whole batch's positives as rows of the weight, or -1.
    config: the `loss` fields.
    first: row of the weight that is the device's first.
    num_local: the device's rows, c.

  Returns:
    Which of the device's rows are drawn, bool [c].
  """
  rows_c = first + jnp.arange(num_local)
  is_class_c = layout.class_of(rows_c) < layout.num_classes
  count = num_sampled(config, layout.num_classes)
  if count == layout.num_classes:
    return is_class_c
  offset_key, key = jax.random.split(key)
  shape = (num_local // layout.rows_per_block, layout.rows_per_block)
  blocks = first // layout.rows_per_block + jnp.arange(shape[0])
  quota = _quotas(offset_key, layout, count)[blocks]
  priority = _priorities(key, layout, blocks)
  if config.negatives == 'partial_fc':
    positive_c = _are_among(rows_BP, first, num_local)
    positive = positive_c.reshape(shape)
    priority = (priority >> 1) | (positive.astype(jnp.uint32) << 31)
    quota = jnp.maximum(quota, jnp.sum(positive, axis=1))
  priority = jnp.where(is_class_c.reshape(shape), priority, 0)
  ascending = jnp.sort(priority, axis=1)
  last = jnp.maximum(layout.rows_per_block - quota, 0)
  last = jnp.minimum(last, layout.rows_per_block - 1)
  lowest = jnp.take_along_axis(ascending, last[:, None], axis=1)
  drawn = (priority >= lowest) & (quota > 0)[:, None]
  return drawn.reshape(-1) & is_class_c


def capacity(
  layout: Layout,
  config: ml_collections.ConfigDict,
  *,
  num_labels: int,
  num_local: int,
) -> int:
  """Rows of a device that hold what `draw` gives it.

  With `uniform` it always does. With `partial_fc` it does unless the batch's
  positives pile up on the device; the caller has to look.

  Args:
    layout: of the classes.
    config: the `loss` fields.
    num_labels: of the whole batch.
    num_local: the device's rows.
  """
  count, classes = num_sampled(config, layout.num_classes), layout.num_classes
  blocks = num_local // layout.rows_per_block
  # No block is dealt more than its share rounded up.
  most = blocks * -(-count * int(layout.block_sizes().max()) // classes)
  if config.negatives == 'partial_fc':
    # Of labels that fall on all classes alike; on fewer, fewer are different.
    positives = num_local * -np.expm1(num_labels * np.log1p(-1 / classes))
    most += int(np.ceil(positives))
  return min(num_local, most)


def _quotas(key: jax.Array, layout: Layout, count: int) -> jax.Array:
  """How many classes to draw from each block, int32 [blocks].

  A block's share of `count` is rounded down or up by systematic sampling: the
  blocks are lined up in random order, and those whose fraction takes the
  running sum past a whole number, from a random start, are rounded up. The
  sum is `count` and every class has the same chance.
  """
  order_key, start_key = jax.random.split(key)
  classes = jnp.uint32(layout.num_classes)
  whole, rest = np.divmod(
    layout.block_sizes().astype(np.int64) * count, layout.num_classes
  )
  order = jax.random.permutation(order_key, layout.blocks)
  fraction = jnp.asarray(rest.astype(np.uint32))[order]
  start = jax.random.randint(start_key, (1,), 0, layout.num_classes)
  # Sums modulo the number of classes, which must not overflow.
  running = lax.associative_scan(
    lambda a, b: jnp.where(a + b >= classes, a + b - classes, a + b),
    jnp.concatenate([start.astype(jnp.uint32), fraction[:-1]]),
  )
  up = running + fraction >= classes
  return jnp.asarray(whole.astype(np.int32)).at[order].add(up)


def _priorities(key: jax.Array, layout: Layout, blocks: jax.Array) -> jax.Array:
  """Random uint32 [blocks, rows_per_block], no two alike in a block."""
  bits = jax.vmap(
    lambda block: jax.random.bits(
      jax.random.fold_in(key, block), (layout.rows_per_block,)
    )
  )(blocks)
  # The low bits are the place; `draw` shifts one of the others out.
  low = int(layout.rows_per_block - 1).bit_length() + 1
  place = jnp.arange(layout.rows_per_block, dtype=jnp.uint32) << 1
  return (bits >> low << low) | place[None]


def _are_among(rows: jax.Array, first: jax.Array, num_local: int) -> jax.Array:
  """Which of the device's rows are in `rows`, bool [c]."""
  local = rows.reshape(-1) - first
  local = jnp.where((rows.reshape(-1) >= 0) & (local >= 0), local, num_local)
  found = jnp.zeros_like(local, shape=num_local, dtype=bool)
  return found.at[local].set(True, mode='drop')
