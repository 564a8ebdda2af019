"""Truncated Newton's method for convex functions of a matrix [A, C].

The Newton step is found by conjugate gradients, preconditioned by the Hessian's
diagonal or its blocks [A, A] (Nocedal & Wright 2006, section 7.1). Float32 is
enough for a value within 1e-6 of the minimum, since no decision near the
minimum hangs on a difference of two values: the step is judged by the slope
along it, and the distance to the minimum by the Newton decrement.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.scipy import linalg

# Of the gradient in the preconditioned norm: what conjugate gradients leave of
# it. 0.1 and 0.5 take 25 % more and 10 % fewer passes; 0.7 misjudges how far
# the minimum is.
_FORCING = 0.25
# Conjugate gradients that have not come there by then rarely do in float32.
_MAX_PRODUCTS = 200
_RIDGE = 3e-6  # Of a block with ones on its diagonal.
# Share of the first slope that a step may leave.
_SLOPE = 0.5
# Relative: what two float32 sums of the same terms may differ by.
_ROUNDING = 1e-5
_MAX_ATTEMPTS = 20


class Point(NamedTuple):
  """A function at one place.

  Attributes:
    x_AC: the place.
    value: of the function.
    gradient_AC: of the function.
    hessian: its diagonal [A, C], or its blocks [C, A, A].
  """

  x_AC: jax.Array
  value: jax.Array
  gradient_AC: jax.Array
  hessian: jax.Array


class _State(NamedTuple):
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
    evaluate: place -> Point.
    product: (place, direction) -> the Hessian there times the direction.
    start_AC: where to begin.
    free_C: bool; the other columns stay as they are.
    zero_sum: steps add up to zero in every row. A softmax does not change along
      the rest, where rounding errors would pile up.
    tolerance: estimated decrease that is left, over the value, at which the
      step that has been found is the last one.
    max_passes: evaluations and products together.

  Returns:
    The last point, how many passes it took, and whether the tolerance was met.
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
  return jnp.sum(a * b)


class _Solving(NamedTuple):
  solution_AC: jax.Array
  residual_AC: jax.Array
  direction_AC: jax.Array
  size: jax.Array  # Of the residual, squared, in the preconditioned norm.
  products: jax.Array


def _direction(product, point, free_C, zero_sum, max_products):
  """Solves Hessian @ direction = -gradient, roughly."""
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
  """Makes the preconditioner residual [A, C] -> direction [A, C]."""
  usable_AC = free_C[None] & (diagonal_AC > 0)
  inverse_AC = jnp.where(usable_AC, 1 / diagonal_AC, 0)
  inverse_A1 = jnp.sum(inverse_AC, axis=1, keepdims=True)

  def precondition(x_AC):
    x_AC = inverse_AC * x_AC
    if not zero_sum:
      return x_AC
    # The inverse of the diagonal among directions that add up to zero.
    share_A1 = jnp.sum(x_AC, axis=1, keepdims=True) / inverse_A1
    return x_AC - jnp.where(inverse_A1 > 0, share_A1, 0) * inverse_AC

  return precondition


def _by_blocks(blocks_CAA, free_C, zero_sum):
  """As `_by_diagonal`, of one factorization a column."""
  diagonal_CA = jnp.diagonal(blocks_CAA, axis1=1, axis2=2)
  scale_CA = jnp.where(
    free_C[:, None] & (diagonal_CA > 0), lax.rsqrt(diagonal_CA), 0
  )
  unit_AA = jnp.eye(blocks_CAA.shape[1])
  scaled_CAA = blocks_CAA * scale_CA[:, :, None] * scale_CA[:, None, :]
  # Ones on the diagonal, and what keeps a factor of float32 real.
  scaled_CAA = jnp.where(unit_AA[None] > 0, 1 + _RIDGE, scaled_CAA)
  factor_CAA = jnp.linalg.cholesky(scaled_CAA)

  def project(x_AC):
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
  return linalg.cho_solve((factor_AA, True), x_A)


class _Searching(NamedTuple):
  point: Point
  size: jax.Array
  # Steps that are too short and too long, and the slopes there.
  low: jax.Array
  low_slope: jax.Array
  high: jax.Array
  high_slope: jax.Array
  tried: jax.Array
  fine: jax.Array


def _line_search(evaluate, point, direction_AC):
  """Shortens a step that ends uphill until the slope is small.

  Returns:
    The point after the step, and how many were tried.
  """
  slope = _dot(point.gradient_AC, direction_AC)

  def attempt(s):
    # To where the slope would vanish, were it linear; it bends upwards.
    share = s.low_slope / (s.low_slope - s.high_slope)
    share = jnp.where(jnp.isfinite(share), jnp.clip(share, 0.1, 0.5), 0.1)
    size = jnp.where(s.tried == 0, 1, s.low + share * (s.high - s.low))
    new = evaluate(point.x_AC + size * direction_AC)
    new_slope = _dot(new.gradient_AC, direction_AC)
    short = new_slope <= -_SLOPE * slope
    short &= new.value <= (1 + _ROUNDING) * point.value
    # A full step may end downhill: the next one goes on from there.
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
