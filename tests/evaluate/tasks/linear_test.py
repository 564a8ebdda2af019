"""The probe against scikit-learn's, and at its edges."""

import functools

import ml_collections
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import logistic
from mlcd_jax.evaluate.tasks import few_shot
from mlcd_jax.evaluate.tasks import linear
from mlcd_jax.runtime import errors
from tests.evaluate import blobs


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


def test_search_ends_at_an_eighth_of_a_decade():
  asked = []

  def values(exponents):
    asked.extend(exponents)
    return [-abs(e - 1.36) for e in exponents]

  assert linear.search(values) == 1.375
  assert len(asked) == 15
  # Of equals the greatest; NaN never.
  assert linear.search(lambda e: [1.0] * len(e)) == 6
  assert linear.search(lambda e: [float('nan')] * len(e)) == 6


@pytest.mark.parametrize('sign', [-1, 1])
def test_search_stays_in_the_range(sign):
  asked = []

  def values(exponents):
    asked.extend(exponents)
    return [sign * e for e in exponents]

  assert linear.search(values) == sign * 6
  assert np.max(np.abs(asked)) == 6


def test_says_how_it_was_fitted():
  x, y = blobs.draw(300)
  found = blobs.run(linear, (x, y), (x, y))
  theirs = LogisticRegression(
    C=1 / found['penalty'], solver='newton-cholesky', tol=1e-10
  ).fit(x.astype(np.float64), y)
  z = theirs.predict_log_proba(x.astype(np.float64))
  half = found['penalty'] / 2 * np.square(theirs.coef_).sum()
  wanted = (half - z[np.arange(300), y].sum()) / 300
  assert found['objective'] == pytest.approx(wanted, rel=1e-6)
  assert found['converged'] == 1 and found['iterations'] > 1


def test_warns_once_when_fits_do_not_converge(monkeypatch, caplog):
  x, y = blobs.draw(100)
  fit = functools.partial(logistic.fit, max_iterations=3)
  monkeypatch.setattr(logistic, 'fit', fit)
  found = blobs.run(linear, (x, y), (x, y))
  assert found['converged'] == 0
  assert len(caplog.records) == 1
  assert 'before they converged' in caplog.text


def test_more_classes_than_rows_and_missing_ones():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 4)).astype(np.float32)
  y = np.array([0, 3, 3, 7, 7, 9])
  test = x, np.array([0, 1, 3, 7, 7, 2])
  found = blobs.run(linear, (x, y), test, 10)
  assert 0 <= found['accuracy'] <= 4 / 6
  for metric in ('mean_per_class', 'mean_top1_top5'):
    config = ml_collections.ConfigDict({'metric': metric})
    found = blobs.run(linear, (x, y), test, 10, config=config)
    assert 0 <= found[f'{metric}_low'] <= found[metric] <= 1


def test_one_row_is_too_few():
  x, y = blobs.draw(1)
  with pytest.raises(errors.UserError, match='1 training images.*at least 2'):
    blobs.run(linear, (x, y), (x, y))


def test_one_class_only_has_no_area_under_the_curve():
  x, y = blobs.draw(60, num_classes=2)
  config = ml_collections.ConfigDict({'metric': 'roc_auc'})
  found = blobs.run(linear, (x, y), (x, y), 2, config=config)
  assert 0.5 < found['roc_auc'] <= 1
  found = blobs.run(linear, (x, y), (x, 0 * y), 2, config=config)
  assert np.isnan(found['roc_auc']) and np.isnan(found['roc_auc_low'])


def test_validation_split_chooses_the_penalty(monkeypatch):
  seen = []
  predict = linear.predict

  def spy(x, y, held, *args, **kwargs):
    seen.append((len(x), held.sum(), held[-30:].all()))
    return predict(x, y, held, *args, **kwargs)

  monkeypatch.setattr(linear, 'predict', spy)
  train, validation, test = (
    blobs.draw(n, seed=s) for s, n in enumerate((100, 30, 50))
  )
  blobs.run(linear, train, test, validation=features.Split(*validation))
  assert seen == [(130, 30, True)]
