"""The multi-label losses of MLCD as pure functions of logits.

Logits are scaled cosines; those of positives include the margin. A loss needs
two inputs for each image: its positive logits and a reduction of its negative
logits. When the classes are sharded, devices exchange only the reduction, never
the negative logits.

Equation numbers refer to the paper (arXiv 2407.17331, section 3).

Shapes: B images, P positives, N negatives.
"""

import jax
from jax import lax
import jax.numpy as jnp

NAMES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
MARGIN_TYPES = ('cosface', 'arcface')

# Lower bound on the sine of the angle: d sin / d cos = -cos / sin, so ArcFace's
# derivative grows without bound as the angle approaches 0.
_SMALLEST_SINE = 1e-3


def multi_label_loss(
  name: str, positives_BP: jax.Array, negatives_BN: jax.Array
) -> jax.Array:
  """Returns the loss of every image, float32 [B].

  Args:
    name: one of NAMES, see `from_reduced`.
    positives_BP: margin-adjusted logits; +inf marks a missing positive.
    negatives_BN: logits; -inf marks a class that is not a negative of the
      image. mean_softmax also accepts [B, P, N], since its negatives may
      differ between the positives of an image.
  """
  reduced = reduce_negatives(name, negatives_BN)
  return from_reduced(name, positives_BP, reduced)


def from_reduced(
  name: str, positives_BP: jax.Array, negatives_B: jax.Array
) -> jax.Array:
  """Returns the loss of every image, float32 [B], from reduced negatives.

  `mlcd` is Eq. 5, log(1 + sum_p exp(-s_p)) + log(1 + sum_n exp(s_n)).
  `mlc` is Eq. 4, log(1 + sum_n exp(s_n) sum_p exp(-s_p)).
  `softmax` is Eq. 3, cross-entropy with one positive, the loss of UNICOM.
  `mean_softmax` averages `softmax` over the positives of an image, following
  the authors' later public code (OneVision-Encoder, training/train.py).
  `sigmoid` is binary cross-entropy summed over positives and negatives, the
  pairwise form of Eq. 9 in the OneVision-Encoder paper.

  Args:
    name: one of NAMES.
    positives_BP: margin-adjusted logits; +inf marks a missing positive.
    negatives_B: the result of `reduce_negatives`. mean_softmax also accepts
      [B, P].

  Raises:
    ValueError: the name is unknown, or softmax has more than one positive.
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
    cosines: cosines of images and their positive centers, any shape.
    margin: the amount subtracted from the cosine (cosface), or the radians
      added to the angle (arcface). For arcface this function differentiates
      cos(angle + margin); the authors' code uses a straight-through gradient.
    scale: the factor that multiplies the result.
    margin_type: one of MARGIN_TYPES.

  Raises:
    ValueError: margin_type is unknown.
  """
  if margin_type == 'cosface':
    return scale * (cosines - margin)
  if margin_type == 'arcface':
    square = jnp.maximum(1 - jnp.square(cosines), _SMALLEST_SINE**2)
    sines = jnp.sqrt(square)
    # The addition theorem gives cos(angle + margin) without an arccos.
    return scale * (cosines * jnp.cos(margin) - sines * jnp.sin(margin))
  raise ValueError(f'margin_type {margin_type!r} is none of {MARGIN_TYPES}')


def negative_logits(
  cosines: jax.Array, *, scale: float, interclass_filter: float = 0.0
) -> jax.Array:
  """Returns the logits of negatives.

  Args:
    cosines: cosines of images and their negative centers, any shape.
    scale: the factor that multiplies the cosines.
    interclass_filter: the threshold above which a cosine becomes 0, because
      the class is probably not a true negative (CombinedMarginLoss in the
      authors' code). 0 turns the filter off.
  """
  if interclass_filter:
    cosines = jnp.where(cosines > interclass_filter, 0, cosines)
  return scale * cosines


def with_other_positives(
  negatives_B: jax.Array, logits_BP: jax.Array, drawn_BP: jax.Array
) -> jax.Array:
  """Returns the reduced negatives of each positive in `mean_softmax`, [B, P].

  In `mean_softmax`, the other positives of an image act as negatives if they
  were drawn.

  Args:
    negatives_B: log-sum-exp over the negatives that all positives share.
    logits_BP: the logits of the positives when they act as negatives, so
      without a margin.
    drawn_BP: bool, True where a positive is among the drawn classes.
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
  """Reduces the logits of negatives over the last axis, in float32.

  Args:
    name: one of NAMES. `sigmoid` sums softplus, all others use log-sum-exp.
    logits: [..., N]; -inf marks a class that is not a negative of the image.
  """
  if name == 'sigmoid':
    return jnp.sum(jax.nn.softplus(logits.astype(jnp.float32)), axis=-1)
  return log_sum_exp(logits)


def merge_negatives(
  name: str, reduced_B: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
  """Merges the results of `reduce_negatives` on each device's classes.

  Args:
    name: one of NAMES.
    reduced_B: the reduction over this device's classes.
    axes: the mesh axes over which the classes are sharded.
  """
  if name == 'sigmoid':
    return lax.psum(reduced_B, axes)
  return merge_log_sum_exp(reduced_B, axes)


def log_sum_exp(logits: jax.Array) -> jax.Array:
  """Returns log(sum(exp(logits))) over the last axis, in float32.

  Where every logit is -inf, its gradient is zero; that of jax.nn.logsumexp is
  NaN.
  """
  logits = logits.astype(jnp.float32)
  peak = _finite(lax.stop_gradient(jnp.max(logits, axis=-1)))
  total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
  return _log(total) + peak


def merge_log_sum_exp(reduced_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Merges the results of `log_sum_exp` on each device's classes."""
  # pmax has no derivative. None is needed, because the peak cancels.
  peak_B = _finite(lax.pmax(lax.stop_gradient(reduced_B), axes))
  return _log(lax.psum(jnp.exp(reduced_B - peak_B), axes)) + peak_B


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a + b, with zero gradients where either is -inf."""
  # jnp.where takes the gradient of both branches, so the unused branch must be
  # finite or it yields NaN.
  empty = (a == -jnp.inf) | (b == -jnp.inf)
  return jnp.where(
    empty, -jnp.inf, jnp.where(empty, 0, a) + jnp.where(empty, 0, b)
  )


def _finite(peak: jax.Array) -> jax.Array:
  """Replaces -inf, the peak of an empty set, by 0; NaN stays NaN."""
  return jnp.where(peak == -jnp.inf, 0, peak)


def _log(x: jax.Array) -> jax.Array:
  """Returns log(x) for x >= 0, with a zero gradient at 0; NaN stays NaN."""
  return jnp.where(x == 0, -jnp.inf, jnp.log(jnp.where(x == 0, 1, x)))
