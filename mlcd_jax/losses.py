"""The multi-label losses of MLCD as pure functions of logits.

Logits are scaled cosines; a positive's has its margin subtracted already. A
loss needs two things of an image: its positive logits, and a reduction of its
negative logits, which is all that has to be gathered where the classes lie on
many devices.

Equations are those of the paper (arXiv 2407.17331, section 3).

Shapes: B images, P positives, N negatives.
"""

import jax
from jax import lax
import jax.numpy as jnp

NAMES = ('mlcd', 'mlc', 'softmax')


def multi_label_loss(
  name: str, positives_BP: jax.Array, negatives_BN: jax.Array
) -> jax.Array:
  """Returns the loss of every image, [B].

  Args:
    name: one of NAMES.
    positives_BP: margin-adjusted logits; +inf where there is no positive.
    negatives_BN: logits; -inf where a class is no negative of the image.
  """
  return from_reduced(name, positives_BP, log_sum_exp(negatives_BN))


def from_reduced(
  name: str, positives_BP: jax.Array, negatives_B: jax.Array
) -> jax.Array:
  """Returns the loss of every image, [B], from reduced negatives.

  `mlcd` is Eq. 5, log(1 + sum_p exp(-s_p)) + log(1 + sum_n exp(s_n)).
  `mlc` is Eq. 4, log(1 + sum_n exp(s_n) sum_p exp(-s_p)).
  `softmax` is cross-entropy with one positive, Eq. 3, as UNICOM trains.

  Args:
    name: one of NAMES.
    positives_BP: margin-adjusted logits; +inf where there is no positive.
    negatives_B: log of the sum of the negatives' exponentials.

  Raises:
    ValueError: unknown name, or softmax with more than one positive.
  """
  positives_B = log_sum_exp(-positives_BP)
  if name == 'mlcd':
    return jax.nn.softplus(positives_B) + jax.nn.softplus(negatives_B)
  if name == 'softmax' and positives_BP.shape[-1] != 1:
    raise ValueError(f'softmax has one positive, not {positives_BP.shape[-1]}')
  if name in ('mlc', 'softmax'):
    return jax.nn.softplus(_add(negatives_B, positives_B))
  raise ValueError(f'loss {name!r} is none of {NAMES}')


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
