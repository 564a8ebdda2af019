"""The probe against scikit-learn's."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from mlcd_jax.evaluate import few_shot
from mlcd_jax.evaluate import linear
from tests.evaluate import blobs


def objective(model, x, y, penalty):
  logits = x @ model['weight'] + model['bias']
  logits -= logits.max(1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  loss = -log_probs[np.arange(len(y)), y].mean()
  return loss + penalty / 2 * (model['weight'] ** 2).sum()


def test_fit_equals_scikit_learn():
  x, y = blobs.draw(300)
  weight = np.ones(len(x))
  weight[200:] = 0  # Left out, as the held-out rows are.
  penalty = 1e-3
  model = linear.fit(x, y, weight, 4, penalty=penalty)
  theirs = LogisticRegression(
    C=1 / (penalty * 200), max_iter=5_000, tol=1e-8
  ).fit(x[:200], y[:200])
  reference = {'weight': theirs.coef_.T, 'bias': theirs.intercept_}
  found, expected = (
    objective(m, x[:200].astype(np.float64), y[:200], penalty)
    for m in (model, reference)
  )
  assert abs(found - expected) < 1e-5
  np.testing.assert_array_equal(
    np.argmax(x @ model['weight'] + model['bias'], 1), theirs.predict(x)
  )


def test_probe_finds_what_is_there():
  x, y = blobs.draw(800)
  test_x, test_y = blobs.draw(400, seed=1)
  data = (x, y), (test_x, test_y)
  found = blobs.run(linear, *data)
  theirs = LogisticRegression(max_iter=1_000).fit(x, y).score(test_x, test_y)
  assert abs(found['accuracy'] - theirs) < 0.02
  assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high']
  assert found['accuracy_count'] == 400


def test_features_without_information_give_chance():
  x, _ = blobs.draw(400)
  labels = np.random.default_rng(0).integers(0, 4, 400).astype(np.int32)
  test_labels = np.random.default_rng(1).integers(0, 4, 400).astype(np.int32)
  data = (x, labels), (x[::-1], test_labels)
  assert abs(blobs.run(linear, *data)['accuracy'] - 0.25) < 0.1


def test_few_shot_draws_and_their_interval():
  x, y = blobs.draw(800, noise=2.5)
  test_x, test_y = blobs.draw(400, noise=2.5, seed=1)
  data = (x, y), (test_x, test_y)
  few = blobs.run(few_shot, *data)
  assert few['accuracy_count'] == 5
  assert few['accuracy_low'] < few['accuracy'] < few['accuracy_high']
  assert few['accuracy'] < blobs.run(linear, *data)['accuracy'] + 0.01
