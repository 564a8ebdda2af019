"""Truncated Newton's method for convex functions of a matrix [A, C].

Conjugate gradients find the Newton step. Their preconditioner is the Hessian's
diagonal or its diagonal blocks [A, A] (Nocedal & Wright 2006, section 7.1).

Float32 is enough to come within 1e-6 of the minimum, relatively. No decision
near the minimum depends on the difference of two values, which would be
rounding errors there: the slope along a step decides whether to accept it, and
the Newton decrement tells the distance to the minimum.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy import linalg

# Conjugate gradients stop once the residual is this share of the gradient, both
# in the preconditioned norm. 0.1 takes 25 % more passes, 0.5 takes 10 % fewer.
# With 0.7 the estimated distance to the minimum is wrong.
_FORCING = 0.25
# Conjugate gradients that need more products rarely end at all in float32.
_MAX_PRODUCTS = 200
# Added to the diagonal of a block whose diagonal is scaled to ones. Without it
# the Cholesky factor of a nearly singular block is NaN in float32.
_RIDGE = 3e-6
# A step is accepted if the slope at its end is at most this share of the slope
# at its start.
_SLOPE = 0.5
# The relative difference that two float32 sums of the same terms may have.
_ROUNDING = 1e-5
# Attempts of a line search; each cuts the range of lengths by 10 % or more.
_MAX_ATTEMPTS = 20


class Point(NamedTuple):
  """The value and the derivatives of the function at one point.

  Attributes:
    x_AC: the point.
    value: the value of the function.
    gradient_AC: the gradient of the function.
    hessian: the diagonal [A, C] of the Hessian, or its diagonal blocks
      [C, A, A], one for each column.
  """

  x_AC: jax.Array
  value: jax.Array
  gradient_AC: jax.Array
  hessian: jax.Array


class _State(NamedTuple):
  """The state of the outer loop, one iteration per Newton step."""

  point: Point
  passes: jax.Array
  converged: jax.Array


def minimise(
  evaluate: Callable[[jax.Array], Point],
  product: Callable[[jax.Array, jax.Array], jax.Array],
  start_AC: jax.Array,
  free_C: jax.Array,
  *,
  zero_sum: bool,
  tolerance: float,
  max_passes: int,
) -> tuple[Point, jax.Array, jax.Array]:
  """Minimises a convex function.

  Args:
    evaluate: a function x [A, C] -> Point.
    product: a function (x [A, C], direction [A, C]) -> the Hessian at x times
      the direction.
    start_AC: the first point.
    free_C: bool; the columns to change. The others keep their values.
    zero_sum: True to keep the sum of every row unchanged. A softmax does not
      depend on these sums, so rounding errors would build up in them.
    tolerance: the relative decrease of the value below which a Newton step,
      by its own estimate, is the last one.
    max_passes: the number of calls of `evaluate` and `product` after which it
      stops.

  Returns:
    The last point, the number of passes, and whether the tolerance was met.
  """

  def step(state):
    point = state.point
    direction_AC, products, solved = _direction(
      lambda v_AC: product(point.x_AC, v_AC),
      point,
      free_C,
      zero_sum,
      jnp.minimum(_MAX_PRODUCTS, max_passes - state.passes),
    )
    new, evaluations = _line_search(evaluate, point, direction_AC)
    # Half the squared Newton decrement: the decrease of a quadratic function.
    decrease = -_dot(point.gradient_AC, direction_AC) / 2
    small = decrease <= tolerance * point.value
    return _State(
      new,
      state.passes + products + evaluations,
      small & solved,
    )

  def going(state):
    return ~state.converged & (state.passes < max_passes)

  state = _State(evaluate(start_AC), jnp.int32(1), jnp.bool_(False))
  return tuple(lax.while_loop(going, step, state))


def _dot(a, b):
  """Returns the inner product of two matrices."""
  return jnp.sum(a * b)


class _Solving(NamedTuple):
  """The state of the conjugate gradients, one iteration per product."""

  solution_AC: jax.Array
  residual_AC: jax.Array
  direction_AC: jax.Array
  size: jax.Array  # The square of the residual's preconditioned norm.
  products: jax.Array


def _direction(product, point, free_C, zero_sum, max_products):
  """Solves Hessian @ direction = -gradient roughly, by conjugate gradients.

  Args:
    product: a function direction [A, C] -> the Hessian times the direction.
    point: the point of the gradient and of the preconditioner's Hessian.
    free_C: bool; the direction is zero in the other columns.
    zero_sum: True for a direction whose rows sum to zero.
    max_products: the number of products after which it stops.

  Returns:
    The direction [A, C], the number of products, and False if the maximum of
    products came first.
  """
  make = _by_diagonal if point.hessian.ndim == 2 else _by_blocks
  precondition = make(point.hessian, free_C, zero_sum)

  def improve(s):
    product_AC = product(s.direction_AC)
    length = s.size / _dot(s.direction_AC, product_AC)
    residual_AC = s.residual_AC - length * product_AC
    scaled_AC = precondition(residual_AC)
    size = _dot(residual_AC, scaled_AC)
    return _Solving(
      s.solution_AC + length * s.direction_AC,
      residual_AC,
      scaled_AC + size / s.size * s.direction_AC,
      size,
      s.products + 1,
    )

  residual_AC = -point.gradient_AC
  scaled_AC = precondition(residual_AC)
  first = _dot(residual_AC, scaled_AC)
  enough = _FORCING**2 * first

  def going(s):
    return (s.size > enough) & (s.products < max_products)

  zeros_AC = jnp.zeros_like(residual_AC)
  begun = _Solving(zeros_AC, residual_AC, scaled_AC, first, jnp.int32(0))
  s = lax.while_loop(going, improve, begun)
  return s.solution_AC, s.products, s.size <= enough


def _by_diagonal(diagonal_AC, free_C, zero_sum):
  """Makes the preconditioner that divides by the Hessian's diagonal.

  Returns:
    A function from a residual [A, C] to a direction [A, C]. The direction is
    zero in the columns that are not free, and in axes without curvature.
  """
  usable_AC = free_C[None] & (diagonal_AC > 0)
  inverse_AC = jnp.where(usable_AC, 1 / diagonal_AC, 0)
  inverse_A1 = jnp.sum(inverse_AC, axis=1, keepdims=True)

  def precondition(x_AC):
    x_AC = inverse_AC * x_AC
    if not zero_sum:
      return x_AC
    # Solves the diagonal system under the constraint that every row of the
    # direction sums to zero; `share` is the Lagrange multiplier.
    share_A1 = jnp.sum(x_AC, axis=1, keepdims=True) / inverse_A1
    return x_AC - jnp.where(inverse_A1 > 0, share_A1, 0) * inverse_AC

  return precondition


def _by_blocks(blocks_CAA, free_C, zero_sum):
  """Makes the preconditioner that solves with the Hessian's blocks.

  It factorizes one block per column. See `_by_diagonal` for what it returns.
  """
  diagonal_CA = jnp.diagonal(blocks_CAA, axis1=1, axis2=2)
  scale_CA = jnp.where(
    free_C[:, None] & (diagonal_CA > 0), lax.rsqrt(diagonal_CA), 0
  )
  unit_AA = jnp.eye(blocks_CAA.shape[1])
  scaled_CAA = blocks_CAA * scale_CA[:, :, None] * scale_CA[:, None, :]

  scaled_CAA = jnp.where(unit_AA[None] > 0, 1 + _RIDGE, scaled_CAA)
  factor_CAA = jnp.linalg.cholesky(scaled_CAA)

  def project(x_AC):
    """Removes the columns that are not free, and with zero_sum the means."""
    x_AC = jnp.where(free_C[None], x_AC, 0)
    if not zero_sum:
      return x_AC
    mean_A1 = jnp.sum(x_AC, axis=1, keepdims=True) / jnp.sum(free_C)
    return jnp.where(free_C[None], x_AC - mean_A1, 0)

  def precondition(x_AC):
    x_CA = project(x_AC).T * scale_CA
    x_CA = jax.vmap(_solve)(factor_CAA, x_CA) * scale_CA
    return project(x_CA.T)

  return precondition


def _solve(factor_AA, x_A):
  """Solves one block's system from its lower Cholesky factor."""
  return linalg.cho_solve((factor_AA, True), x_A)


class _Searching(NamedTuple):
  """The state of the line search, one iteration per attempted step."""

  point: Point
  size: jax.Array
  # The longest step known to be too short and the shortest known to be too
  # long, each with the slope at its end.
  low: jax.Array
  low_slope: jax.Array
  high: jax.Array
  high_slope: jax.Array
  tried: jax.Array
  fine: jax.Array


def _line_search(evaluate, point, direction_AC):
  """Takes the full step, or shortens it if the function rises steeply there.

  Args:
    evaluate: a function x [A, C] -> Point.
    point: the start of the step.
    direction_AC: the full step.

  Returns:
    The point at the end of the accepted step, and the number of attempts.
  """
  slope = _dot(point.gradient_AC, direction_AC)

  def attempt(s):
    # Try where the slope would be zero if it were linear from `low` to `high`,
    # but within 10 to 50 % of the way. If the function overflows at `high`, the
    # slope is not finite: try 10 %.
    share = s.low_slope / (s.low_slope - s.high_slope)
    share = jnp.where(jnp.isfinite(share), jnp.clip(share, 0.1, 0.5), 0.1)
    size = jnp.where(s.tried == 0, 1, s.low + share * (s.high - s.low))
    new = evaluate(point.x_AC + size * direction_AC)
    new_slope = _dot(new.gradient_AC, direction_AC)
    short = new_slope <= -_SLOPE * slope
    short &= new.value <= (1 + _ROUNDING) * point.value
    # A full step may end where the function still falls steeply. The next
    # Newton step then continues from there.
    fine = short & ((s.tried == 0) | (new_slope >= _SLOPE * slope))
    return _Searching(
      new,
      size,
      jnp.where(short, size, s.low),
      jnp.where(short, new_slope, s.low_slope),
      jnp.where(short, s.high, size),
      jnp.where(short, s.high_slope, new_slope),
      s.tried + 1,
      fine,
    )

  def going(s):
    return ~s.fine & (s.tried < _MAX_ATTEMPTS)

  one, zero = jnp.float32(1), jnp.float32(0)
  s = _Searching(
    point, zero, zero, slope, one, zero, jnp.int32(0), jnp.bool_(False)
  )
  s = lax.while_loop(going, attempt, s)
  return s.point, s.tried
