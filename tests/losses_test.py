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
