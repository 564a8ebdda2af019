"""The schedule, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import optimizer
from mlcd_jax.runtime import errors


def config(**fields):
  out = config_lib.default().optimizer
  out.update(fields)
  return out


@pytest.mark.parametrize('warmup', [10, 0.1])
def test_warmup_then_cosine(warmup):
  schedule = optimizer.make_schedule(
    config(learning_rate=1.0, warmup_steps=warmup), 100
  )
  found = np.array([schedule(s) for s in range(101)])
  np.testing.assert_allclose(found[:11], np.arange(11) / 10, atol=1e-6)
  progress = (np.arange(10, 101) - 10) / 90
  np.testing.assert_allclose(
    found[10:], (1 + np.cos(np.pi * progress)) / 2, atol=1e-6
  )


def test_warmup_longer_than_the_run_is_allowed():
  schedule = optimizer.make_schedule(
    config(learning_rate=1.0, warmup_steps=200), 100
  )
  assert float(schedule(100)) == pytest.approx(0.5)


def test_what_decays_and_what_is_multiplied():
  params = {
    'encoder': {
      'block': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
      'norm': {'scale': jnp.ones(2)},
      'positions': jnp.ones((1, 2, 2)),
      'class_token': jnp.ones((1, 1, 2)),
    },
    'classifier': {'weight': jnp.ones((2, 2))},
  }
  tx = optimizer.make(
    config(weight_decay=0.5, head_learning_rate_multiplier=3.0), lambda _: 0.1
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  encoder = updates['encoder']
  np.testing.assert_allclose(encoder['block']['kernel'], -0.05, rtol=1e-6)
  np.testing.assert_allclose(updates['classifier']['weight'], -0.15, rtol=1e-6)
  for still in (
    encoder['block']['bias'],
    encoder['norm']['scale'],
    encoder['positions'],
    encoder['class_token'],
  ):
    np.testing.assert_array_equal(still, 0)


def test_gradients_are_clipped_to_the_norm():
  params = {'kernel': jnp.zeros(4)}
  gradients = {'kernel': jnp.array([30.0, 40.0, 0.0, 0.0])}
  clipped = optimizer.make(config(gradient_clip_norm=5.0), lambda _: 1.0)
  state = clipped.update(gradients, clipped.init(params), params)[1]
  moment = next(s.mu for s in state if hasattr(s, 'mu'))['kernel']
  np.testing.assert_allclose(moment, [0.3, 0.4, 0, 0], rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('polynomial', lambda t: (1 - t) ** 2), ('constant', lambda t: t**0)],
)
def test_other_schedules(name, expected):
  schedule = optimizer.make_schedule(
    config(learning_rate=1.0, warmup_steps=10, schedule=name), 110
  )
  found = np.array([schedule(s) for s in range(111)])
  np.testing.assert_allclose(found[:11], np.arange(11) / 10, atol=1e-6)
  np.testing.assert_allclose(
    found[10:], expected(np.arange(101) / 100), atol=1e-6
  )


def test_multipliers_go_by_name():
  params = {'encoder': {'a': jnp.ones(2), 'b': jnp.ones(2)}}
  rules = (('encoder/a', 0.0), ('encoder/', 0.5))
  tx = optimizer.make(config(multipliers=rules), lambda _: 0.1)
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates['encoder']['a'], 0)
  plain = optimizer.make(config(), lambda _: 0.1)
  expected, _ = plain.update(params, plain.init(params), params)
  np.testing.assert_allclose(
    updates['encoder']['b'], 0.5 * expected['encoder']['b'], rtol=1e-6
  )
  wrong = optimizer.make(config(multipliers=(('decoder', 0.5),)), lambda _: 1.0)
  with pytest.raises(errors.UserError, match="multipliers: 'decoder' matches"):
    wrong.update(params, wrong.init(params), params)


def test_sparse_classifier_moves_only_classes_with_a_gradient():
  params = {'classifier': {'weight': jnp.ones((3, 2))}}
  tx = optimizer.make(config(head_update='sparse'), lambda _: 0.1)
  first = {'classifier': {'weight': jnp.ones((3, 2))}}
  _, state = tx.update(first, tx.init(params), params)
  second = {'classifier': {'weight': jnp.array([[0, 0], [0, 1.0], [2, 0]])}}
  updates, after = tx.update(second, state, params)
  moved = np.any(np.asarray(updates['classifier']['weight']) != 0, axis=1)
  np.testing.assert_array_equal(moved, [False, True, True])
  before, after = (
    next(s.mu for s in x if hasattr(s, 'mu'))['classifier']['weight']
    for x in (state, after)
  )
  np.testing.assert_array_equal(before[0], after[0])
  assert (before[1:] != after[1:]).all()
