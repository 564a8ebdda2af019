"""Values and gradients against the paper's equations in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import losses


def equation(name, positives, negatives):
  """One image's loss, from its list of positive and of negative logits."""
  p, n = np.exp(-np.asarray(positives)).sum(), np.exp(negatives).sum()
  if name == 'mlcd':  # Eq. 5, in its joint form.
    return np.log(1 + n * p + n + p)
  if name == 'mean_softmax':  # Of as many cross-entropies.
    return np.mean([np.log(1 + n * np.exp(-s)) for s in positives])
  if name == 'sigmoid':
    losses_ = [np.log1p(np.exp(-s)) for s in positives]
    return sum(losses_) + sum(np.log1p(np.exp(s)) for s in negatives)
  return np.log(1 + n * p)  # Eq. 4; with one positive Eq. 3.


def numeric_gradient(f, x, step=1e-5):
  out = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    if not np.isfinite(x[i]):
      continue
    up, down = x.copy(), x.copy()
    up[i] += step
    down[i] -= step
    out[i] = (f(up) - f(down)) / (2 * step)
  return out


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', losses.NAMES)
def test_equals_equations(name, seed):
  rng = np.random.default_rng(seed)
  num_positives = 1 if name == 'softmax' else int(rng.integers(2, 6))
  positives = rng.normal(size=(7, num_positives)) * 3
  negatives = rng.normal(size=(7, 20)) * 3
  positives[2, 1:] = np.inf  # Padding.
  negatives[3, :5] = -np.inf  # No negatives of this image.

  def reference(positives, negatives):
    return sum(
      equation(name, p[np.isfinite(p)], n[np.isfinite(n)])
      for p, n in zip(positives, negatives)
    )

  def ours(positives, negatives):
    return jnp.sum(losses.multi_label_loss(name, positives, negatives))

  value, (gradient_p, gradient_n) = jax.value_and_grad(ours, argnums=(0, 1))(
    jnp.asarray(positives, jnp.float32), jnp.asarray(negatives, jnp.float32)
  )
  np.testing.assert_allclose(value, reference(positives, negatives), rtol=1e-6)
  np.testing.assert_allclose(
    gradient_p,
    numeric_gradient(lambda x: reference(x, negatives), positives),
    atol=1e-5,
  )
  np.testing.assert_allclose(
    gradient_n,
    numeric_gradient(lambda x: reference(positives, x), negatives),
    atol=1e-5,
  )


def test_mlc_with_one_positive_is_softmax_cross_entropy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 9)).astype(np.float32) * 5
  expected = -jax.nn.log_softmax(logits)[:, 0]
  for name in ('mlc', 'softmax'):
    found = losses.multi_label_loss(name, logits[:, :1], logits[:, 1:])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['mlcd', 'mlc'])
def test_extreme_logits_stay_finite(name):
  positives = jnp.array([[-64.0, 64.0], [jnp.inf, jnp.inf], [1.0, 2.0]])
  negatives = jnp.array([[64.0, -64.0], [3.0, 4.0], [-jnp.inf, -jnp.inf]])
  value, gradient = jax.value_and_grad(
    lambda p: jnp.sum(losses.multi_label_loss(name, p, negatives))
  )(positives)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('name', ['mlcd', 'mlc'])
def test_nan_is_not_hidden(name):
  nan, number = jnp.full((1, 2), jnp.nan), jnp.ones((1, 2))
  assert np.isnan(losses.multi_label_loss(name, nan, number)).all()
  assert np.isnan(losses.multi_label_loss(name, number, nan)).all()


def test_wrong_uses_are_refused():
  one, two = jnp.zeros((1, 1)), jnp.zeros((1, 2))
  with pytest.raises(ValueError, match='none of'):
    losses.multi_label_loss('circle', one, one)
  with pytest.raises(ValueError, match='one positive'):
    losses.multi_label_loss('softmax', two, one)


def test_joint_and_factored_forms_of_eq_5_agree():
  rng = np.random.default_rng(1)
  p, n = rng.normal(size=(6, 4)) * 3, rng.normal(size=(6, 30)) * 3
  joint = [equation('mlcd', *row) for row in zip(p, n)]
  factored = np.log1p(np.exp(-p).sum(1)) + np.log1p(np.exp(n).sum(1))
  np.testing.assert_allclose(joint, factored, rtol=1e-12)
  found = losses.multi_label_loss('mlcd', jnp.asarray(p), jnp.asarray(n))
  np.testing.assert_allclose(found, joint, rtol=1e-5)


def test_arcface_adds_to_the_angle():
  cosines = np.linspace(-0.9, 0.95, 9)
  fields = dict(margin=0.3, scale=64.0, margin_type='arcface')
  expected = 64 * np.cos(np.arccos(cosines) + 0.3)
  ours = lambda x: losses.positive_logits(x, **fields)  # noqa: E731
  np.testing.assert_allclose(ours(jnp.asarray(cosines)), expected, rtol=1e-4)
  slope = jax.vmap(jax.grad(ours))(jnp.asarray(cosines))
  angle = np.arccos(cosines)
  np.testing.assert_allclose(
    slope, 64 * np.sin(angle + 0.3) / np.sin(angle), rtol=1e-4
  )
  # An image that is its center, where the angle has no derivative.
  assert np.isfinite(jax.grad(ours)(1.0))


def test_close_negatives_are_filtered_to_zero():
  cosines = jnp.array([0.9, 0.75, 0.2, -0.9])
  found = losses.negative_logits(cosines, scale=10, interclass_filter=0.75)
  np.testing.assert_allclose(found, [0, 7.5, 2, -9])
  found = losses.negative_logits(cosines, scale=10)
  np.testing.assert_allclose(found, 10 * cosines)


def test_other_positives_are_negatives_where_drawn():
  logits = np.array([[1.0, 2.0, 3.0]])
  drawn = np.array([[True, False, True]])
  found = losses.with_other_positives(jnp.zeros(1), logits, drawn)
  others = [[3.0], [1.0, 3.0], [1.0]]
  expected = [np.log(1 + np.exp(o).sum()) for o in others]
  np.testing.assert_allclose(found, [expected], rtol=1e-6)
