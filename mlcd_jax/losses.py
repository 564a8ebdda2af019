"""The multi-label losses of MLCD as pure functions of logits.

Logits are scaled cosines; a positive's has its margin in it already. A loss
needs two things of an image: its positive logits, and a reduction of its
negative logits, which is all that has to be gathered where the classes lie on
many devices.

Equations are those of the paper (arXiv 2407.17331, section 3).

Shapes: B images, P positives, N negatives.
"""

import jax
from jax import lax
import jax.numpy as jnp

NAMES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
MARGIN_TYPES = ('cosface', 'arcface')

# Where the angle is so small, ArcFace's derivative grows without bound.
_SMALLEST_SINE = 1e-3


def multi_label_loss(
  name: str, positives_BP: jax.Array, negatives_BN: jax.Array
) -> jax.Array:
  """Returns the loss of every image, float32 [B].

  Args:
    name: one of NAMES, see `from_reduced`.
    positives_BP: margin-adjusted logits; +inf where there is no positive.
    negatives_BN: logits; -inf where a class is no negative of the image. For
      mean_softmax, whose negatives depend on the positive, also [B, P, N].
  """
  reduced = reduce_negatives(name, negatives_BN)
  return from_reduced(name, positives_BP, reduced)


def from_reduced(
  name: str, positives_BP: jax.Array, negatives_B: jax.Array
) -> jax.Array:
  """Returns the loss of every image, float32 [B], from reduced negatives.

  `mlcd` is Eq. 5, log(1 + sum_p exp(-s_p)) + log(1 + sum_n exp(s_n)).
  `mlc` is Eq. 4, log(1 + sum_n exp(s_n) sum_p exp(-s_p)).
  `softmax` is cross-entropy with one positive, Eq. 3, as UNICOM trains.
  `mean_softmax` is the mean of that over the positives, as the authors' later
  public code has it (OneVision-Encoder, training/train.py).
  `sigmoid` is binary cross-entropy summed over positives and negatives, the
  pairwise form of the OneVision-Encoder paper's Eq. 9.

  Args:
    name: one of NAMES.
    positives_BP: margin-adjusted logits; +inf where there is no positive.
    negatives_B: of `reduce_negatives`; for mean_softmax also [B, P].

  Raises:
    ValueError: unknown name, or softmax with more than one positive.
  """
  positives_BP = positives_BP.astype(jnp.float32)
  if name == 'softmax' and positives_BP.shape[-1] != 1:
    raise ValueError(f'softmax has one positive, not {positives_BP.shape[-1]}')
  if name == 'mlcd':
    positives_B = log_sum_exp(-positives_BP)
    return jax.nn.softplus(positives_B) + jax.nn.softplus(negatives_B)
  if name in ('mlc', 'softmax'):
    return jax.nn.softplus(_add(negatives_B, log_sum_exp(-positives_BP)))
  if name == 'mean_softmax':
    if negatives_B.ndim < positives_BP.ndim:
      negatives_B = negatives_B[..., None]
    loss_BP = jax.nn.softplus(_add(negatives_B, -positives_BP))
    count_B = jnp.sum(jnp.isfinite(positives_BP), axis=-1)
    return jnp.sum(loss_BP, axis=-1) / jnp.maximum(count_B, 1)
  if name == 'sigmoid':
    return jnp.sum(jax.nn.softplus(-positives_BP), axis=-1) + negatives_B
  raise ValueError(f'loss {name!r} is none of {NAMES}')


def positive_logits(
  cosines: jax.Array, *, margin: float, scale: float, margin_type: str
) -> jax.Array:
  """Returns the margin-adjusted logits of positives.

  Args:
    cosines: of images with their positive centers, any shape.
    margin: subtracted from the cosine (cosface), or radians added to the angle
      (arcface). ArcFace's gradient is that of cos(angle + margin); the
      authors' code passes it straight through.
    scale: multiplies the result.
    margin_type: one of MARGIN_TYPES.

  Raises:
    ValueError: unknown margin_type.
  """
  if margin_type == 'cosface':
    return scale * (cosines - margin)
  if margin_type == 'arcface':
    square = jnp.maximum(1 - jnp.square(cosines), _SMALLEST_SINE**2)
    sines = jnp.sqrt(square)
    return scale * (cosines * jnp.cos(margin) - sines * jnp.sin(margin))
  raise ValueError(f'margin_type {margin_type!r} is none of {MARGIN_TYPES}')


def negative_logits(
  cosines: jax.Array, *, scale: float, interclass_filter: float = 0.0
) -> jax.Array:
  """Returns the logits of negatives.

  Args:
    cosines: of images with their negative centers, any shape.
    scale: multiplies them.
    interclass_filter: cosines above it become 0, as in the authors'
      CombinedMarginLoss: such a class is probably no negative. 0 = off.
  """
  if interclass_filter:
    cosines = jnp.where(cosines > interclass_filter, 0, cosines)
  return scale * cosines


def with_other_positives(
  negatives_B: jax.Array, logits_BP: jax.Array, drawn_BP: jax.Array
) -> jax.Array:
  """Each positive's negatives in `mean_softmax`, reduced, [B, P].

  There an image's other positives, where drawn, are negatives as any other.

  Args:
    negatives_B: log-sum-exp over the negatives common to all positives.
    logits_BP: the positives' logits as negatives, that is without margin.
    drawn_BP: which positives are among the classes drawn.
  """
  itself_PP = jnp.eye(logits_BP.shape[-1], dtype=bool)
  others_BPP = jnp.where(
    drawn_BP[:, None, :] & ~itself_PP[None], logits_BP[:, None, :], -jnp.inf
  )
  common_BP1 = jnp.broadcast_to(
    negatives_B[:, None, None], (*logits_BP.shape, 1)
  )
  return log_sum_exp(jnp.concatenate([others_BPP, common_BP1], axis=-1))


def reduce_negatives(name: str, logits: jax.Array) -> jax.Array:
  """What a loss needs of the negatives' logits, float32, the last axis gone.

  Args:
    name: one of NAMES.
    logits: [..., N]; -inf where a class is no negative of the image.
  """
  if name == 'sigmoid':
    return jnp.sum(jax.nn.softplus(logits.astype(jnp.float32)), axis=-1)
  return log_sum_exp(logits)


def merge_negatives(
  name: str, reduced_B: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
  """Merges `reduce_negatives` of each device's share of the classes."""
  if name == 'sigmoid':
    return lax.psum(reduced_B, axes)
  return merge_log_sum_exp(reduced_B, axes)


def log_sum_exp(logits: jax.Array) -> jax.Array:
  """Log of the sum of exponentials over the last axis, in float32.

  Unlike jax.nn.logsumexp it has a zero gradient, not NaN, where every logit
  is -inf.
  """
  logits = logits.astype(jnp.float32)
  peak = _finite(lax.stop_gradient(jnp.max(logits, axis=-1)))
  total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
  return _log(total) + peak


def merge_log_sum_exp(reduced_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Merges `log_sum_exp` of each device's share of the classes."""
  # pmax has no derivative; that of a peak that cancels is not needed.
  peak_B = _finite(lax.pmax(lax.stop_gradient(reduced_B), axes))
  return _log(lax.psum(jnp.exp(reduced_B - peak_B), axes)) + peak_B


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
  """A + b, with zero gradients where one is -inf."""
  empty = (a == -jnp.inf) | (b == -jnp.inf)
  return jnp.where(
    empty, -jnp.inf, jnp.where(empty, 0, a) + jnp.where(empty, 0, b)
  )


def _finite(peak: jax.Array) -> jax.Array:
  """0 for the peak of nothing; NaN stays, so that it is seen."""
  return jnp.where(peak == -jnp.inf, 0, peak)


def _log(x: jax.Array) -> jax.Array:
  """Log of x >= 0 with a zero gradient at 0; NaN stays NaN."""
  return jnp.where(x == 0, -jnp.inf, jnp.log(jnp.where(x == 0, 1, x)))
