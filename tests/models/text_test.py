"""The text tower: what it may see, where it pools, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax.models import text


def make(**fields):
  config = dict(
    vocab_size=30,
    context=8,
    width=12,
    depth=2,
    heads=3,
    mlp_dim=20,
    embedding_dim=5,
    dtype=jnp.float32,
  )
  model = text.TextTower(**(config | fields))
  tokens = np.arange(16).reshape(2, 8) % 8 + 1
  return model, jax.jit(model.init)(jax.random.key(0), tokens), tokens


def test_what_follows_the_end_has_no_influence():
  model, variables, tokens = make(end_token=29)
  tokens[:, 4] = 29
  apply = jax.jit(model.apply)
  before = apply(variables, tokens)['embedding']
  tokens[:, 5:] = 3
  after = apply(variables, tokens)['embedding']
  np.testing.assert_array_equal(before, after)
  short = apply(variables, tokens[:, :5])['embedding']
  np.testing.assert_allclose(before, short, rtol=1e-5, atol=1e-6)
  tokens[:, 2] = 20
  assert np.abs(apply(variables, tokens)['embedding'] - before).max() > 0


@pytest.mark.parametrize(
  ('end_token', 'tokens', 'place'),
  [
    (-1, [1, 5, 9, 9, 3], 2),  # The highest id, at its first place.
    (5, [1, 5, 9, 5, 3], 1),
    (7, [1, 5, 9, 9, 3], 0),  # None: as in transformers, the first.
  ],
)
def test_pools_where_the_text_ends(end_token, tokens, place):
  model, variables, _ = make(end_token=end_token, embedding_dim=0)
  out = jax.jit(model.apply)(variables, np.array([tokens]))
  np.testing.assert_array_equal(out['pooled'], out['tokens'][:, place])
  np.testing.assert_array_equal(out['embedding'], out['pooled'])


def test_bfloat16_stays_close_and_weights_stay_float32():
  model, variables, tokens = make()
  exact = jax.jit(model.apply)(variables, tokens)['embedding']
  half = model.clone(dtype=jnp.bfloat16)
  rough = jax.jit(half.apply)(variables, tokens)['embedding']
  assert exact.dtype == rough.dtype == jnp.float32
  assert np.abs(exact - rough).max() / np.abs(exact).max() < 0.03
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
