"""The solver against scikit-learn's LogisticRegression."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlcd_jax import sharding
from mlcd_jax.evaluate import logistic
from tests.evaluate import blobs


def objective(weight, bias, x, y, penalty):
  """In float64, of classes."""
  logits = x.astype(np.float64) @ weight + bias
  logits -= logits.max(1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  loss = -log_probs[np.arange(len(y)), y].mean()
  return loss + penalty / 2 * np.square(weight.astype(np.float64)).sum()


@pytest.mark.parametrize('shape', [(300, 12), (40, 60)])
def test_equals_scikit_learn(shape):
  num_rows, dim = shape
  x, y = blobs.draw(num_rows, dim=dim)
  x = 3 * x + 5  # Neither centered nor scaled.
  used = num_rows * 2 // 3
  weight = np.arange(num_rows) < used  # The rest is held out.
  penalties = np.array([1e-3, 1e-1, 10.0])
  found = logistic.fit(
    logistic.prepare(x, sharding.make_mesh()),
    y,
    weight,
    penalties,
    num_outputs=4,
    tolerance=1e-7,
  )
  for w, b, penalty in zip(*found, penalties):
    theirs = LogisticRegression(
      C=1 / (penalty * used), max_iter=20_000, tol=1e-9
    ).fit(x[:used].astype(np.float64), y[:used])
    mine, wanted = (
      objective(w, b, x[:used], y[:used], penalty)
      for w, b in ((w, b), (theirs.coef_.T, theirs.intercept_))
    )
    assert mine == pytest.approx(wanted, rel=1e-5)
    assert not np.allclose(w, 0)
    margin = np.sort(theirs.decision_function(x), axis=1)
    clear = margin[:, -1] - margin[:, -2] > 1e-3
    np.testing.assert_array_equal(
      np.argmax(x @ w + b, 1)[clear], theirs.predict(x)[clear]
    )


def test_independent_outputs_equal_one_fit_each():
  x, y = blobs.draw(240)
  hot = np.stack([y % 2, y > 1, y == 3], 1).astype(int)
  (w,), (b,) = logistic.fit(
    logistic.prepare(x, sharding.make_mesh()),
    hot,
    np.ones(240),
    np.array([1e-2]),
    num_outputs=3,
    loss='sigmoid',
    tolerance=1e-7,
  )
  for c in range(3):
    theirs = LogisticRegression(C=1 / 2.4, max_iter=5_000, tol=1e-9).fit(
      x.astype(np.float64), hot[:, c]
    )
    np.testing.assert_allclose(w[:, c], theirs.coef_[0], atol=2e-3)
    np.testing.assert_allclose(b[c], theirs.intercept_[0], atol=2e-3)


def test_a_penalty_does_not_depend_on_its_company_nor_the_mesh(monkeypatch):
  x, y = blobs.draw(200)
  monkeypatch.setattr(logistic, '_MIN_SPLIT', 0)

  def fit(penalties, **mesh):
    rows = logistic.prepare(x, sharding.make_mesh(**mesh))
    assert len(rows.x_NA.sharding.device_set) == (1 if mesh else 8)
    return logistic.fit(
      rows, y, np.ones(200), np.array(penalties), num_outputs=4, tolerance=1e-6
    )[0]

  many = fit([1e-3, 1.0])
  np.testing.assert_allclose(many[1], fit([1.0])[0], atol=1e-4)
  one = fit([1.0], devices=jax.devices()[:1])
  np.testing.assert_allclose(one[0], many[1], atol=1e-4)


def test_repeated_features_cost_nothing():
  x, y = blobs.draw(300, dim=100)
  mesh = sharding.make_mesh()
  grey = logistic.prepare(np.tile(x, 3), mesh)
  assert grey.x_NA.shape == (300, 128)
  w, _ = logistic.fit(
    grey, y, np.ones(300), np.ones(1), num_outputs=4, tolerance=1e-6
  )
  once, _ = logistic.fit(
    logistic.prepare(x, mesh),
    y,
    np.ones(300),
    np.ones(1) / 3,
    num_outputs=4,
    tolerance=1e-6,
  )
  np.testing.assert_allclose(w[0].reshape(3, 100, 4).sum(0), once[0], atol=1e-4)


def test_tiles_do_not_change_the_fit(monkeypatch):
  x, y = blobs.draw(1_000)
  rows = logistic.prepare(x, sharding.make_mesh())

  def fit():
    return logistic.fit(
      rows, y, np.ones(1_000), np.ones(1), num_outputs=4, tolerance=1e-6
    )[0]

  whole = fit()
  monkeypatch.setattr(logistic, '_CPU_LOGITS', 1)
  np.testing.assert_allclose(fit(), whole, atol=1e-4)


def test_an_empty_class_is_never_predicted():
  x, y = blobs.draw(100, num_classes=3)
  (w,), (b,) = logistic.fit(
    logistic.prepare(x, sharding.make_mesh()),
    y,
    np.ones(100),
    np.array([1e-3]),
    num_outputs=5,
  )
  assert np.isfinite(w).all() and np.isfinite(b).all()
  assert np.argmax(x @ w + b, 1).max() < 3
