"""The solver against scikit-learn's LogisticRegression."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlcd_jax import sharding
from mlcd_jax.evaluate import logistic
from tests.evaluate import blobs

# Over CLIP's sweep, 10^-6 to 10^6.
_EXPONENTS = (6, 3, 0.5, -2, -4, -6)


def fit(x, y, penalty, weight=None, num_outputs=4, **kwargs):
  """Of all rows, on a mesh of all devices."""
  rows = logistic.prepare(x, sharding.make_mesh(), num_outputs=num_outputs)
  weight = np.ones(len(x)) if weight is None else weight
  return logistic.fit(rows, y, weight, penalty, **kwargs)


def objective(weight, bias, x, y, penalty, rows=None):
  """In float64, of classes [N], or of 0 and 1 [N, C]."""
  z = x.astype(np.float64) @ weight + bias
  if y.ndim == 2:
    losses = np.logaddexp(0, np.where(y > 0, -z, z)).sum(1)
  else:
    others = z - z[np.arange(len(y)), y][:, None]
    others[np.arange(len(y)), y] = -np.inf
    most = np.maximum(others.max(1), 0)
    rest = np.exp(others - most[:, None]).sum(1)
    losses = np.where(
      most > 0, most + np.log(np.exp(-most) + rest), np.log1p(rest)
    )
  half = penalty / 2 * np.square(weight.astype(np.float64)).sum()
  return (losses.sum() + half) / (rows or len(y))


def theirs(x, y, penalty):
  """Weight and bias of scikit-learn, whose problem it is made to be."""
  x = x.astype(np.float64)
  # Centered, and small features made large by the unit of their penalty, it
  # would be another problem: only the center is taken away.
  mean = x.mean(0)
  model = LogisticRegression(
    C=1 / penalty, solver='newton-cholesky', max_iter=1_000, tol=1e-10
  ).fit(x - mean, y)
  return model.coef_.T, model.intercept_ - mean @ model.coef_.T


def scaled(x, y):
  """Features whose standard deviations go from 1e-3 to 1e3."""
  scale = np.logspace(-3, 3, x.shape[1])[::-1].astype(np.float32)
  return x * scale + 3 * scale, y


# Of one shape on the devices, so that they share a compiled solver.
_DATA = {
  'blobs': blobs.draw(120),
  'off center': (lambda x, y: (3 * x + 500, y))(*blobs.draw(120)),
  'separable': blobs.draw(120, noise=0.3),
  'of all scales': scaled(*blobs.draw(120)),
  'repeated': (lambda x, y: (np.tile(x, (2, 3)), np.tile(y, 2)))(
    *blobs.draw(60)
  ),
  'constant': (lambda x, y: (np.pad(x, [(0, 0), (0, 3)]) + 7, y))(
    *blobs.draw(120)
  ),
  'no signal': (blobs.draw(120)[0], np.arange(120) % 4),
  'rare': (
    blobs.draw(120)[0],
    np.where(np.arange(120) % 20, 0, 1 + np.arange(120) // 20 % 3),
  ),
  'fewer rows than features': blobs.draw(
    150, dim=300
  ),  # Too many axes for blocks.
}


@pytest.mark.parametrize('name', _DATA)
def test_reaches_the_minimum_at_every_penalty(name):
  x, y = _DATA[name]
  rows = logistic.prepare(x, sharding.make_mesh(), num_outputs=4)
  weight = np.arange(len(x)) < len(x) * 5 // 6  # The rest is held out.
  x, y = x[weight], y[weight]
  whole = np.zeros(len(weight), int)
  whole[weight] = y
  warm = None
  for exponent in _EXPONENTS:
    penalty = 10.0**exponent
    wanted = objective(*theirs(x, y, penalty), x, y, penalty)
    warm = logistic.fit(rows, whole, weight, penalty, start=warm)
    cold = logistic.fit(rows, whole, weight, penalty)
    for model in (warm, cold):
      found = objective(model.weight_DC, model.bias_C, x, y, penalty)
      assert model.converged
      assert found <= wanted * (1 + 1e-6)
      assert model.objective == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize('data', ['blobs', 'separable', 'of all scales'])
def test_independent_outputs_equal_one_fit_each(data):
  x, y = _DATA[data]
  hot = np.stack([y % 2, y > 1, y == 3, np.arange(len(y)) == 7], 1).astype(int)
  model = None
  rows = logistic.prepare(x, sharding.make_mesh(), num_outputs=4)
  for exponent in _EXPONENTS:
    penalty = 10.0**exponent
    model = logistic.fit(
      rows, hot, np.ones(len(x)), penalty, loss='sigmoid', start=model
    )
    assert model.converged
    each = [theirs(x, hot[:, c], penalty) for c in range(4)]
    weight, bias = (np.concatenate(p, -1) for p in zip(*each))
    wanted = objective(weight, bias, x, hot, penalty)
    found = objective(model.weight_DC, model.bias_C, x, hot, penalty)
    assert found <= wanted * (1 + 1e-6)


def test_what_is_below_zero_is_left_out_of_its_output():
  x, y = blobs.draw(120)
  hot = np.stack([y % 2, y > 1, y == 3, y == 0], 1).astype(int)
  hot[:50, 0] = hot[30:70, 2] = -1
  model = fit(x, hot, 1.0, loss='sigmoid')
  for c in range(4):
    known = hot[:, c] >= 0
    weight, bias = theirs(x[known], hot[known, c], 1.0)
    np.testing.assert_allclose(model.weight_DC[:, c], weight[:, 0], atol=1e-3)
    np.testing.assert_allclose(model.bias_C[c], bias[0], atol=1e-3)
  model = fit(x, np.where(np.arange(120) < 40, -1, y), 1.0)
  weight, _ = theirs(x[40:], y[40:], 1.0)
  np.testing.assert_allclose(model.weight_DC, weight, atol=1e-3)


def test_says_when_the_iterations_run_out():
  x, y = blobs.draw(120, noise=0.3)
  model = fit(x, y, 1e-6, max_iterations=9)
  assert not model.converged and 9 <= model.iterations < 30
  start = objective(np.zeros((12, 4)), np.zeros(4), x, y, 1e-6)
  assert model.objective < start


def test_a_penalty_does_not_depend_on_the_mesh(monkeypatch):
  x, y = blobs.draw(120)
  monkeypatch.setattr(logistic, '_MIN_SPLIT', 0)

  def weight(**mesh):
    rows = logistic.prepare(x, sharding.make_mesh(**mesh), num_outputs=4)
    assert len(rows.x_KTA.sharding.device_set) == (1 if mesh else 8)
    return logistic.fit(rows, y, np.ones(120), 120.0).weight_DC

  one = weight(devices=jax.devices()[:1])
  np.testing.assert_allclose(one, weight(), atol=1e-4)


def test_repeated_features_cost_nothing():
  x, y = blobs.draw(120, dim=100)
  grey = logistic.prepare(np.tile(x, 3), sharding.make_mesh(), num_outputs=4)
  assert grey.x_KTA.shape[2] == 128
  model = logistic.fit(grey, y, np.ones(120), 120.0)
  once = fit(x, y, 40.0)
  np.testing.assert_allclose(
    model.weight_DC.reshape(3, 100, 4).sum(0), once.weight_DC, atol=1e-4
  )


def test_tiles_do_not_change_the_fit(monkeypatch):
  x, y = blobs.draw(600)
  whole = fit(x, y, 600.0)
  monkeypatch.setattr(logistic, '_CPU_LOGITS', 1)
  tiles = fit(x, y, 600.0)
  np.testing.assert_allclose(tiles.weight_DC, whole.weight_DC, atol=1e-4)


def test_a_class_comes_and_goes_between_fits():
  x, y = blobs.draw(120)
  rows = logistic.prepare(x, sharding.make_mesh(), num_outputs=4)
  without = (y != 3).astype(float)
  model = None
  for weight in (without, np.ones(120), without):
    model = logistic.fit(rows, y, weight, 1e-2, start=model)
    used = weight > 0
    found = objective(model.weight_DC, model.bias_C, x[used], y[used], 1e-2)
    wanted = objective(*theirs(x[used], y[used], 1e-2), x[used], y[used], 1e-2)
    assert model.converged and found <= wanted * (1 + 1e-6)
    assert np.isfinite(model.weight_DC).all()
    assert set(np.argmax(x @ model.weight_DC + model.bias_C, 1)) <= set(y[used])


def test_an_output_that_is_always_or_never_there():
  x, y = blobs.draw(120)
  hot = np.stack([y > -1, y < 0, y == 1, y == 2], 1).astype(int)
  model = fit(x, hot, 1e-2, loss='sigmoid')
  z = x @ model.weight_DC + model.bias_C
  assert np.isfinite(z).all() and model.converged
  assert (z[:, 0] > 0).all() and (z[:, 1] < 0).all()
