"""The layout of classes in the classifier's weight, and the draw of negatives.

Classes are dealt to blocks of rows one at a time, so the sizes of two blocks
differ by at most one class, and devices are balanced. The blocks take turns in
bit-reversed order, so that neighbouring clusters (popular ones, for example)
lie on different devices. Each block draws its negatives from its own random
numbers, so the draw does not depend on the mesh.

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
  """The rows of the weight that hold the classes, the same on every mesh.

  Attributes:
    num_classes: the number of classes without padding.
  """

  num_classes: int

  @property
  def blocks(self) -> int:
    """Returns the number of blocks of rows, all of the same size.

    A device owns whole blocks, so at most so many devices can share the
    classes.
    """
    # A power of two, as the bit reversal needs. Many classes may be spread over
    # more devices; with few, more blocks would only add padding.
    return 8_192 if self.num_classes > 2**19 else 1_024

  @property
  def rows_per_block(self) -> int:
    """Returns the rows of a block: the number of classes of the fullest."""
    return -(-self.num_classes // self.blocks)

  @property
  def rows(self) -> int:
    """Returns the number of rows of all blocks, including padding."""
    return self.blocks * self.rows_per_block

  def rows_over(self, num_devices: int) -> int:
    """Returns the rows of the weight: equally many whole blocks per device.

    If the number of devices does not divide that of the blocks, empty blocks
    at the end fill up the array. Nothing is drawn from them, and their number
    depends on the mesh.

    Args:
      num_devices: the number of devices that share the rows.
    """
    return -(-self.blocks // num_devices) * num_devices * self.rows_per_block

  def row_of(self, classes: jax.Array) -> jax.Array:
    """Returns the rows of the weight that hold the classes; -1 stays -1."""
    block = jnp.asarray(self._turns)[classes % self.blocks]
    place = classes // self.blocks
    return jnp.where(classes >= 0, block * self.rows_per_block + place, -1)

  def class_of(self, rows: jax.Array) -> jax.Array:
    """Returns the classes of rows of the weight, the inverse of `row_of`.

    Rows of padding give numbers of at least num_classes.
    """
    block, place = rows // self.rows_per_block, rows % self.rows_per_block
    turn = jnp.asarray(self._turns).at[block].get(mode='clip')
    return jnp.where(block < self.blocks, place * self.blocks + turn, self.rows)

  def block_sizes(self) -> np.ndarray:
    """Returns the number of classes in each block, int32 [blocks]."""
    return -(-(self.num_classes - self._turns) // self.blocks)

  @property
  def _turns(self) -> np.ndarray:
    """Returns the bit-reversed order of blocks, which is its own inverse."""
    turns = np.zeros(1, np.int32)
    while len(turns) < self.blocks:
      turns = np.concatenate([2 * turns, 2 * turns + 1])
    return turns


def num_sampled(config: ml_collections.ConfigDict, num_classes: int) -> int:
  """Returns the number of classes to draw per step, at least one."""
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
  """Draws this device's share of the classes of a step.

  `uniform` draws exactly `num_sampled` classes, each with the same
  probability. `partial_fc` takes the positives of the whole batch first and
  then fills up with other classes. PartialFC does so on each device; this
  function does so on each block. A block with more positives than its share
  keeps them all.

  Args:
    key: the key of the step, equal on every device.
    layout: the layout of the classes.
    rows_BP: the positives of the whole batch as rows of the weight, or -1.
    config: the `loss` fields.
    first: the first row of the weight that lies on the device.
    num_local: c, the number of rows on the device.

  Returns:
    Bool [c], True for the rows that are drawn.
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
    # The top bit ranks every positive before all other classes.
    priority = (priority >> 1) | (positive.astype(jnp.uint32) << 31)
    quota = jnp.maximum(quota, jnp.sum(positive, axis=1))
  priority = jnp.where(is_class_c.reshape(shape), priority, 0)
  # The `quota` highest priorities of each block are drawn.
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
  """Returns the number of rows a device needs for the classes it draws.

  With `uniform` the draw always fits. With `partial_fc` it may not fit, if many
  positives of the batch lie on the same device; the caller must check.

  Args:
    layout: the layout of the classes.
    config: the `loss` fields.
    num_labels: the number of labels in the whole batch.
    num_local: the number of rows on the device.
  """
  count, classes = num_sampled(config, layout.num_classes), layout.num_classes
  blocks = num_local // layout.rows_per_block
  # No block draws more than its share rounded up.
  most = blocks * -(-count * int(layout.block_sizes().max()) // classes)
  if config.negatives == 'partial_fc':
    # The expected number of distinct positives if labels fall on all classes
    # alike. If they fall on fewer classes, fewer of them are distinct.
    positives = num_local * -np.expm1(num_labels * np.log1p(-1 / classes))
    most += int(np.ceil(positives))
  return min(num_local, most)


def _quotas(key: jax.Array, layout: Layout, count: int) -> jax.Array:
  """Returns the number of classes to draw from each block, int32 [blocks].

  The share of a block in `count` is rounded up or down by systematic sampling.
  The fractions of the blocks are summed in random order from a random start. A
  block is rounded up if its fraction takes the running sum past a whole
  number. The quotas sum to `count`, and every class has the same probability.
  """
  order_key, start_key = jax.random.split(key)
  classes = jnp.uint32(layout.num_classes)
  whole, rest = np.divmod(
    layout.block_sizes().astype(np.int64) * count, layout.num_classes
  )
  order = jax.random.permutation(order_key, layout.blocks)
  fraction = jnp.asarray(rest.astype(np.uint32))[order]
  start = jax.random.randint(start_key, (1,), 0, layout.num_classes)
  # Fractions are counted in 1 / num_classes: integers keep the sum exact, and
  # the modulo keeps it from overflowing.
  running = lax.associative_scan(
    lambda a, b: jnp.where(a + b >= classes, a + b - classes, a + b),
    jnp.concatenate([start.astype(jnp.uint32), fraction[:-1]]),
  )
  up = running + fraction >= classes
  return jnp.asarray(whole.astype(np.int32)).at[order].add(up)


def _priorities(key: jax.Array, layout: Layout, blocks: jax.Array) -> jax.Array:
  """Returns random uint32 [blocks, rows_per_block], distinct in a block."""
  bits = jax.vmap(
    lambda block: jax.random.bits(
      jax.random.fold_in(key, block), (layout.rows_per_block,)
    )
  )(blocks)
  # The place in the block fills the low bits and breaks ties. It is shifted by
  # one, because `draw` may drop the lowest bit.
  low = int(layout.rows_per_block - 1).bit_length() + 1
  place = jnp.arange(layout.rows_per_block, dtype=jnp.uint32) << 1
  return (bits >> low << low) | place[None]


def _are_among(rows: jax.Array, first: jax.Array, num_local: int) -> jax.Array:
  """Returns bool [c], True for the device's rows that occur in `rows`."""
  local = rows.reshape(-1) - first
  local = jnp.where((rows.reshape(-1) >= 0) & (local >= 0), local, num_local)
  found = jnp.zeros_like(local, shape=num_local, dtype=bool)
  return found.at[local].set(True, mode='drop')
