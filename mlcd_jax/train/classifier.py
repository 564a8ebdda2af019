"""Class centers sharded over every device, and the loss against them.

As in PartialFC every device owns a share of the classes. Embeddings and
labels are gathered, which costs O(B D), while the weights and their gradients,
O(C D), never leave their device. Negatives are one subset of the classes a
step, shared by the batch; an image's own positives are computed apart and
masked out of it.

Shapes: B images, D dimensions, C classes padded to whole blocks, P positives,
S sampled classes, N pairs of an image and a positive. Upper case is global,
lower case this device's part.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from mlcd_jax import losses
from mlcd_jax import sharding
from mlcd_jax.models import matmul
from mlcd_jax.runtime import errors
from mlcd_jax.train import sampling

# The paper's code family draws them from N(0, 0.01) (unicom/partial_fc.py).
INIT_STDDEV = 0.01

# Room for positives on a device, in shares of them: labels spread as evenly
# as the classes do, so that more is as good as never needed.
_PAIRS_SLACK = 2


class _Capacity(NamedTuple):
  """Room for what of the classes lies on a device and takes part."""

  sampled: int
  pairs: int


def init(
  key: jax.Array, num_classes: int, dim: int, num_devices: int = 1
) -> dict[str, jax.Array]:
  """Returns {"weight": float32 [C, D]}, for any devices the same classes."""
  layout = sampling.Layout(num_classes)
  weight = INIT_STDDEV * jax.random.normal(key, (layout.rows, dim))
  padding = layout.rows_over(num_devices) - layout.rows
  return {'weight': jnp.pad(weight, ((0, padding), (0, 0)))}


def check_devices(num_classes: int, num_devices: int) -> None:
  """Raises UserError where there are more devices than blocks of classes."""
  blocks = sampling.Layout(num_classes).blocks
  if num_devices > blocks:
    raise errors.UserError(
      f'mesh: classifier/weight lies in {blocks:,} blocks, too few for '
      f'{num_devices:,} devices; use at most {blocks:,}'
    )


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
  layout = sampling.Layout(num_classes)

  def local(w_cD, e_bD, labels_bP, key):
    e_BD = lax.all_gather(_unit(e_bD), sharding.AXES, tiled=True)
    labels_BP = lax.all_gather(labels_bP, sharding.AXES, tiled=True)
    rows_BP = layout.row_of(_without_repeats(labels_BP))
    num_local = w_cD.shape[0]
    first = lax.axis_index(sharding.AXES) * num_local
    drawn_c = sampling.draw(
      key, layout, rows_BP, config=config, first=first, num_local=num_local
    )
    # Out of bounds, and so neither read nor written, where not the device's.
    own_BP = jnp.where(rows_BP >= first, rows_BP - first, num_local)
    own_BP = jnp.minimum(own_BP, num_local)
    negatives_B, cosines_BP = _statistics(
      w_cD,
      e_BD,
      own_BP,
      drawn_c,
      small=_capacity(layout, config, own_BP, num_local, mesh.size),
      config=config,
      dtype=dtype,
    )
    loss_B = _merged_loss(
      config, negatives_B, cosines_BP, rows_BP >= 0, _drawn(drawn_c, own_BP)
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


def _drawn(drawn_c: jax.Array, own_BP: jax.Array) -> jax.Array:
  """Which of the positives this device owns and drew."""
  return drawn_c.at[own_BP].get(mode='fill', fill_value=False)


def _merged_loss(config, negatives_B, cosines_BP, valid_BP, drawn_BP):
  """The loss of every image from what each device knows."""
  negatives_B = losses.merge_negatives(config.name, negatives_B, sharding.AXES)
  # Each positive lives on one device; the others add zero.
  cosines_BP = lax.psum(cosines_BP, sharding.AXES)
  # Where these meet what differs between devices their gradients are summed
  # over those: here, and not once they are broadcast to [B, P, P].
  negatives_B, cosines_BP = lax.pcast(
    (negatives_B, cosines_BP), sharding.AXES, to='varying'
  )
  positives_BP = losses.positive_logits(
    cosines_BP,
    margin=config.margin,
    scale=config.scale,
    margin_type=config.margin_type,
  )
  positives_BP = jnp.where(valid_BP, positives_BP, jnp.inf)
  if config.name == 'mean_softmax':
    drawn_BP = lax.psum(drawn_BP.astype(jnp.int32), sharding.AXES) > 0
    negatives_B = losses.with_other_positives(
      negatives_B, _negative_logits(config, cosines_BP), drawn_BP & valid_BP
    )
  return losses.from_reduced(config.name, positives_BP, negatives_B)


def _negative_logits(config, cosines):
  return losses.negative_logits(
    cosines, scale=config.scale, interclass_filter=config.interclass_filter
  )


def _capacity(layout, config, own_BP, num_local, num_devices) -> _Capacity:
  """Room that is as good as always enough; `_statistics` sees to the rest."""
  sampled = sampling.capacity(
    layout, config, num_labels=own_BP.size, num_local=num_local
  )
  pairs = -(-_PAIRS_SLACK * own_BP.size // num_devices)
  return _Capacity(sampled, min(pairs, own_BP.size))


def _statistics(w_cD, e_BD, own_BP, drawn_c, *, small, config, dtype):
  """What this device knows of all images.

  Where the classes that take part do not fit the small capacity, a slower
  branch takes its place that has room for all of them: the capacity is a
  matter of speed alone. Devices branch each for themselves.

  Args:
    w_cD: the device's classes.
    e_BD: unit embeddings of all images.
    own_BP: their positives as rows of w_cD, or out of bounds.
    drawn_c: which of the device's classes are drawn.
    small: the capacity.
    config: the `loss` fields.
    dtype: of the products' operands.

  Returns:
    The reduced negatives [B], and the cosines of those positives that the
    device owns [B, P], zero for the others.
  """
  full = _Capacity(w_cD.shape[0], own_BP.size)
  if config.negatives == 'uniform':  # Then what is drawn always fits.
    full = full._replace(sampled=small.sampled)
  run = functools.partial(_with_room, config=config, dtype=dtype)
  if small == full:
    return run(w_cD, e_BD, own_BP, drawn_c, capacity=full)
  fits = jnp.sum(drawn_c) <= small.sampled
  fits &= jnp.sum(own_BP < w_cD.shape[0]) <= small.pairs
  return _either(
    fits,
    functools.partial(run, capacity=small),
    functools.partial(run, capacity=full),
    w_cD,
    e_BD,
    own_BP,
    drawn_c,
  )


def _either(fits, fast, slow, w_cD, e_BD, *indices):
  """lax.cond(fits, fast, slow) that keeps only its inputs for the gradient.

  lax.cond keeps what either branch needs, and writes zeros for the one it did
  not take.
  """

  @jax.custom_vjp
  def call(fits, w_cD, e_BD, *indices):
    return lax.cond(fits, fast, slow, w_cD, e_BD, *indices)

  def backward(residuals, cotangents):
    fits, w_cD, e_BD, *indices = residuals

    def gradients(branch):
      def run(cotangents):
        _, vjp = jax.vjp(lambda w, e: branch(w, e, *indices), w_cD, e_BD)
        return vjp(cotangents)

      return run

    w_bar, e_bar = lax.cond(fits, gradients(fast), gradients(slow), cotangents)
    return None, w_bar, e_bar, *(None for _ in indices)

  call.defvjp(lambda *args: (call(*args), args), backward)
  return call(fits, w_cD, e_BD, *indices)


def _with_room(w_cD, e_BD, own_BP, drawn_c, *, capacity, config, dtype):
  """`_statistics` with a given capacity."""
  num_local = w_cD.shape[0]
  budget = int(config.chunk_megabytes * 2**20)
  row_s = _drawn_rows(drawn_c, capacity.sampled)
  pairs_n = _owned_pairs(own_BP, num_local, capacity.pairs)
  in_one = 4 * capacity.pairs * w_cD.shape[1] <= budget
  row_n = own_BP.reshape(-1).at[pairs_n].get(mode='fill', fill_value=num_local)
  w_sD, w_nD = _take(w_cD, row_s, row_n if in_one else row_n[:0])

  w_sD = _unit(w_sD)
  negative_s = jnp.where(row_s < num_local, row_s, -1)
  negatives_B = _in_chunks(
    functools.partial(
      _reduced_negatives,
      w_sD=w_sD,
      negative_s=negative_s,
      config=config,
      dtype=dtype,
    ),
    (e_BD, own_BP),
    chunk=budget // (4 * capacity.sampled),
  )
  if in_one:
    cosines_BP = _pair_cosines(_unit(w_nD), e_BD, pairs_n, own_BP.shape)
  else:
    cosines_BP = _in_chunks(
      lambda e_BD, own_BP: _pair_cosines(
        _unit(_read(w_cD, own_BP.reshape(-1))), e_BD, None, own_BP.shape
      ),
      (e_BD, own_BP),
      chunk=budget // (4 * w_cD.shape[1] * own_BP.shape[1]),
    )
  return negatives_B, cosines_BP


def _drawn_rows(drawn_c: jax.Array, capacity: int) -> jax.Array:
  """The drawn rows, ascending; the rest of the capacity is out of bounds."""
  num_local = drawn_c.shape[0]
  if capacity == num_local:
    return jnp.where(drawn_c, jnp.arange(num_local), num_local)
  found = _places(drawn_c, capacity)
  # All different, so that a scatter to them need not be serial.
  return jnp.where(found < num_local, found, num_local + jnp.arange(capacity))


def _owned_pairs(own_BP: jax.Array, num_local: int, capacity: int) -> jax.Array:
  """Flat indices into own_BP of what the device owns; the rest is outside."""
  if capacity == own_BP.size:
    return jnp.arange(own_BP.size)
  return _places(own_BP.reshape(-1) < num_local, capacity)


def _places(mask: jax.Array, capacity: int) -> jax.Array:
  """Where the mask is set, then its length; jnp.nonzero's scatter is slow."""
  return jnp.searchsorted(jnp.cumsum(mask), jnp.arange(1, capacity + 1))


def _reduced_negatives(e_BD, own_BP, *, w_sD, negative_s, config, dtype):
  """Reduces a chunk of images' negatives, [B]."""
  cosines_Bs = matmul.matmul(e_BD, w_sD.T, dtype)
  masked_Bs = (negative_s < 0)[None]
  for p in range(own_BP.shape[1]):  # One fused comparison, no [B, s, P].
    masked_Bs = masked_Bs | (own_BP[:, p, None] == negative_s[None])
  logits_Bs = _negative_logits(config, cosines_Bs)
  return losses.reduce_negatives(
    config.name, jnp.where(masked_Bs, -jnp.inf, logits_Bs)
  )


def _pair_cosines(w_nD, e_BD, pairs_n, shape):
  """Cosines [B, P] of pairs with their centers; zero where there is none."""
  num_pairs = shape[0] * shape[1]
  if w_nD.shape[0] == num_pairs:
    return jnp.sum(e_BD[:, None] * w_nD.reshape(*shape, -1), axis=-1)
  e_nD = e_BD.at[pairs_n // shape[1]].get(mode='fill', fill_value=0)
  cosines_n = jnp.sum(e_nD * w_nD, axis=-1)
  cosines = jnp.zeros_like(cosines_n, shape=num_pairs)
  return cosines.at[pairs_n].set(cosines_n, mode='drop').reshape(shape)


@jax.custom_vjp
def _take(w_cD, row_s, row_n):
  """Rows of the weight, zeros where out of bounds.

  The gradients of both meet in one array of the weight's size; the sum of two
  would be one more pass over it.

  Args:
    w_cD: the weight.
    row_s: all different; w_cD as it is where there are as many.
    row_n: any.
  """
  if len(row_s) == len(w_cD):
    return w_cD, _read(w_cD, row_n)
  return _read(w_cD, row_s, unique_indices=True), _read(w_cD, row_n)


def _take_backward(residuals, gradients):
  row_s, row_n, w_like = residuals
  g_sD, g_nD = gradients
  if len(row_s) == len(w_like):
    return g_sD.at[row_n].add(g_nD, mode='drop'), None, None
  g_cD = jnp.zeros_like(g_sD, shape=(len(w_like), g_sD.shape[1]))
  g_cD = g_cD.at[row_s].add(
    g_sD, mode='drop', unique_indices=True, indices_are_sorted=True
  )
  return g_cD.at[row_n].add(g_nD, mode='drop'), None, None


_take.defvjp(
  lambda w_cD, row_s, row_n: (
    _take(w_cD, row_s, row_n),
    (row_s, row_n, w_cD[:, :0]),
  ),
  _take_backward,
)


def _read(w_cD, rows, **promises):
  return w_cD.at[rows].get(mode='fill', fill_value=0, **promises)


def _in_chunks(f, images, *, chunk):
  """Maps f over chunks of images and recomputes them in the backward pass.

  Of its temporaries only one chunk's then ever exists.
  """
  num_images = images[0].shape[0]
  if num_images <= chunk:
    return f(*images)
  num_chunks = -(-num_images // max(1, chunk))
  size = -(-num_images // num_chunks)
  padding = num_chunks * size - num_images

  def split(x):
    x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(num_chunks, size, *x.shape[1:])

  out = lax.map(
    jax.checkpoint(lambda xs: f(*xs)), tuple(split(x) for x in images)
  )
  return out.reshape(-1, *out.shape[2:])[:num_images]
