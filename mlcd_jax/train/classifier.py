"""Class centers sharded over every device, and the loss against them.

As in PartialFC, every device owns a share of the classes. Devices gather the
embeddings and labels, O(B D); the weights and their gradients, O(C D), never
leave their device. Each step draws one subset of the classes as negatives for
the whole batch. The positives of an image are computed separately and masked
out of its negatives.

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

# The authors' code draws class centers from N(0, 0.01) (unicom/partial_fc.py).
INIT_STDDEV = 0.01

# Room for a device's positives, as a multiple of its fair share. Labels spread
# almost as evenly as classes; `_statistics` handles the rare excess.
_PAIRS_SLACK = 2


class _Capacity(NamedTuple):
  """Room on a device for drawn classes, and for pairs whose center it owns."""

  sampled: int
  pairs: int


def init(
  key: jax.Array, num_classes: int, dim: int, num_devices: int = 1
) -> dict[str, jax.Array]:
  """Returns {"weight": float32 [C, D]}; only padding depends on num_devices."""
  layout = sampling.Layout(num_classes)
  weight = INIT_STDDEV * jax.random.normal(key, (layout.rows, dim))
  padding = layout.rows_over(num_devices) - layout.rows
  return {'weight': jnp.pad(weight, ((0, padding), (0, 0)))}


def check_devices(num_classes: int, num_devices: int) -> None:
  """Raises UserError if there are more devices than blocks of classes."""
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
    weight_CD: class centers of any length, sharded as sharding.CLASSES.
    embeddings_BD: embeddings of any length, sharded as sharding.BATCH.
    labels_BP: int32 classes, -1 for a missing label; repeats count once.
    num_classes: the number of classes without padding.
    config: the `loss` fields.
    dtype: the type of the operands of products, which accumulate in float32.
    key: the key that draws the negatives; equal on every device.
    mesh: the mesh of all devices.
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
    # num_local is out of bounds: gathers fill it and scatters drop it.
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
  """Normalises rows to unit length in float32; zero rows stay zero."""
  # 1e-12 keeps the derivative finite at a zero row.
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def _without_repeats(labels_BP: jax.Array) -> jax.Array:
  """Replaces every repetition of a label within an image by -1."""
  same = labels_BP[:, :, None] == labels_BP[:, None, :]
  earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
  return jnp.where(jnp.any(same & earlier[None], axis=-1), -1, labels_BP)


def _drawn(drawn_c: jax.Array, own_BP: jax.Array) -> jax.Array:
  """Returns bool [B, P], True for positives this device owns and drew."""
  return drawn_c.at[own_BP].get(mode='fill', fill_value=False)


def _merged_loss(config, negatives_B, cosines_BP, valid_BP, drawn_BP):
  """Merges the statistics of all devices into the loss of every image, [B]."""
  negatives_B = losses.merge_negatives(config.name, negatives_B, sharding.AXES)
  # One device owns each positive; all others add zero.
  cosines_BP = lax.psum(cosines_BP, sharding.AXES)
  # Mark these as device-varying here, so that their gradients are summed over
  # devices at [B] and [B, P], not after the broadcast to [B, P, P].
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
  """Returns the logits of negatives with the scale and filter of the config."""
  return losses.negative_logits(
    cosines, scale=config.scale, interclass_filter=config.interclass_filter
  )


def _capacity(layout, config, own_BP, num_local, num_devices) -> _Capacity:
  """Returns room that is almost always enough; `_statistics` has a fallback."""
  sampled = sampling.capacity(
    layout, config, num_labels=own_BP.size, num_local=num_local
  )
  pairs = -(-_PAIRS_SLACK * own_BP.size // num_devices)
  return _Capacity(sampled, min(pairs, own_BP.size))


def _statistics(w_cD, e_BD, own_BP, drawn_c, *, small, config, dtype):
  """Returns this device's reduced negatives [B] and positive cosines [B, P].

  Cosines of positives that the device does not own are zero. If drawn classes
  or owned pairs exceed the small capacity, a slower branch with room for all
  runs instead: the capacity affects speed, never the result. Each device
  chooses its branch on its own.

  Args:
    w_cD: the device's class centers.
    e_BD: unit embeddings of all images.
    own_BP: their positives as rows of w_cD; out of bounds if not owned.
    drawn_c: bool, True for the device's drawn classes.
    small: the capacity of the fast branch.
    config: the `loss` fields.
    dtype: the type of the operands of products.
  """
  full = _Capacity(w_cD.shape[0], own_BP.size)
  if config.negatives == 'uniform':  # Its draws always fit `small`.
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
  """Runs lax.cond(fits, fast, slow), but saves only its inputs for backward.

  lax.cond itself saves residuals of both branches, zeros for the one not
  taken. Here the backward pass recomputes its branch.
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
  """Computes the result of `_statistics` with room for the given capacity."""
  num_local = w_cD.shape[0]
  budget = int(config.chunk_megabytes * 2**20)
  row_s = _drawn_rows(drawn_c, capacity.sampled)
  pairs_n = _owned_pairs(own_BP, num_local, capacity.pairs)
  # Four bytes an element: centers and logits are float32.
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
  """Returns the drawn rows [capacity], padded with rows out of bounds."""
  num_local = drawn_c.shape[0]
  if capacity == num_local:
    # In place, so that `_take` can skip the gather.
    return jnp.where(drawn_c, jnp.arange(num_local), num_local)
  found = _places(drawn_c, capacity)
  # Distinct padding lets the gradient's scatter promise unique indices.
  return jnp.where(found < num_local, found, num_local + jnp.arange(capacity))


def _owned_pairs(own_BP: jax.Array, num_local: int, capacity: int) -> jax.Array:
  """Returns indices [capacity] into flat own_BP of pairs the device owns."""
  if capacity == own_BP.size:
    return jnp.arange(own_BP.size)  # Every pair, owned or not.
  return _places(own_BP.reshape(-1) < num_local, capacity)


def _places(mask: jax.Array, capacity: int) -> jax.Array:
  """Computes jnp.nonzero(fill_value=len(mask)) without its slow scatter."""
  return jnp.searchsorted(jnp.cumsum(mask), jnp.arange(1, capacity + 1))


def _reduced_negatives(e_BD, own_BP, *, w_sD, negative_s, config, dtype):
  """Reduces the negatives of a chunk of images to [B].

  `negative_s` holds the device's row of each center in w_sD, -1 for padding.
  """
  cosines_Bs = matmul.matmul(e_BD, w_sD.T, dtype)
  masked_Bs = (negative_s < 0)[None]
  for p in range(own_BP.shape[1]):  # One fused comparison, no [B, s, P].
    masked_Bs = masked_Bs | (own_BP[:, p, None] == negative_s[None])
  logits_Bs = _negative_logits(config, cosines_Bs)
  return losses.reduce_negatives(
    config.name, jnp.where(masked_Bs, -jnp.inf, logits_Bs)
  )


def _pair_cosines(w_nD, e_BD, pairs_n, shape):
  """Returns the cosines [B, P] of images and the positives the device owns.

  `shape` is (B, P). `pairs_n` is unused if w_nD has a row for every pair.
  """
  num_pairs = shape[0] * shape[1]
  if w_nD.shape[0] == num_pairs:
    return jnp.sum(e_BD[:, None] * w_nD.reshape(*shape, -1), axis=-1)
  e_nD = e_BD.at[pairs_n // shape[1]].get(mode='fill', fill_value=0)
  cosines_n = jnp.sum(e_nD * w_nD, axis=-1)
  cosines = jnp.zeros_like(cosines_n, shape=num_pairs)
  return cosines.at[pairs_n].set(cosines_n, mode='drop').reshape(shape)


@jax.custom_vjp
def _take(w_cD, row_s, row_n):
  """Reads two sets of rows of the weight; zeros where out of bounds.

  The backward pass adds both gradients into one array of the weight's size. Two
  arrays and their sum would cost another pass over it. The rows of `row_s` are
  distinct; if there are c of them, w_cD is returned.
  """
  if len(row_s) == len(w_cD):
    return w_cD, _read(w_cD, row_n)
  return _read(w_cD, row_s, unique_indices=True), _read(w_cD, row_n)


def _take_backward(residuals, gradients):
  """Returns the gradient of the weight, and None for both sets of rows."""
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
    (row_s, row_n, w_cD[:, :0]),  # Its length and type, without its data.
  ),
  _take_backward,
)


def _read(w_cD, rows, **promises):
  """Returns rows of the weight; zeros where out of bounds."""
  return w_cD.at[rows].get(mode='fill', fill_value=0, **promises)


def _in_chunks(f, images, *, chunk):
  """Maps f over chunks of images; the backward pass recomputes each chunk."""
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
