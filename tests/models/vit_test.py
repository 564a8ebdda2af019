"""The vision transformer: shapes, types, skipped blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.models import matmul
from mlcd_jax.models import vit
from mlcd_jax.runtime import errors
from mlcd_jax.weights import huggingface


def make(**fields):
  config = config_lib.default().model
  config.variant = 'Nano/7'
  config.image_size = 14
  config.embedding_dim = 16
  config.dtype = 'float32'
  config.update(fields)
  return models.make(config)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 14, 14, 3), np.uint8)


def count(model):
  """Returns the number of parameters without the projection."""
  params = dict(huggingface.abstract_params(model))
  del params['projection']
  return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ('variant', 'millions'),
  [
    # Of the image towers without projection, at 224 pixels: Dosovitskiy et
    # al. and Touvron et al. (2021), SO400M's blocks, OpenCLIP's table.
    ('Ti/16', 5.5),
    ('S/16', 21.7),
    ('B/16', 85.8),
    ('L/14', 303),
    ('SO400M/14', 412),
    ('H/14', 631),
    ('g/14', 1_011),
    ('bigG/14', 1_843),
  ],
)
def test_variants_have_the_published_sizes(variant, millions):
  model = make(variant=variant, image_size=224)
  one, two = (count(model.clone(depth=depth)) for depth in (1, 2))
  found = one + (model.depth - 1) * (two - one)  # Blocks are alike.
  assert found / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize(
  ('pooling', 'tokens'), [('class_token', 5), ('average', 4), ('attention', 4)]
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_shapes_and_types(pooling, tokens, dtype):
  model = make(pooling=pooling, dtype=dtype)
  out, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), IMAGES
  )
  shapes = {k: v.shape for k, v in out.items()}
  assert shapes == {
    'hidden': (3, tokens, 96),
    'tokens': (3, tokens, 96),
    'pooled': (3, 96),
    'embedding': (3, 16),
  }
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((out, variables)))


@pytest.mark.parametrize('position', ['learned', 'rope2d'])
def test_scan_has_the_same_parameters_and_numbers(position):
  plain = make(position=position)
  scanned = make(position=position, scan_layers=True, remat='full')
  variables = jax.jit(plain.init)(jax.random.key(0), IMAGES)
  again = jax.jit(scanned.init)(jax.random.key(0), IMAGES)
  jax.tree.map(np.testing.assert_array_equal, variables, again)
  assert {'block_00', 'block_01', 'block_02'} < set(variables['params'])
  np.testing.assert_allclose(
    jax.jit(plain.apply)(variables, IMAGES)['embedding'],
    jax.jit(scanned.apply)(variables, IMAGES)['embedding'],
    atol=1e-5,
  )


def test_drop_path_only_with_a_key_and_the_mean_is_kept():
  plain, dropping = make(), make(drop_path=0.5)
  variables = jax.jit(plain.init)(jax.random.key(0), IMAGES)
  expected = jax.jit(plain.apply)(variables, IMAGES)['tokens']
  found = jax.jit(dropping.apply)(variables, IMAGES)['tokens']
  np.testing.assert_array_equal(found, expected)
  keys = jax.random.split(jax.random.key(0), 300)
  weights = jax.vmap(lambda key: dropping._drop_path(key, 8))(keys)
  np.testing.assert_array_equal(weights[:, 0], 1)  # The first block stays.
  assert set(np.unique(weights[:, 2])) == {0, 2}
  np.testing.assert_allclose(weights.mean((0, 2, 3, 4, 5)), 1, atol=0.05)


def test_products_accumulate_in_float32_both_ways():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(5, 700)), jnp.bfloat16)
  y = jnp.asarray(rng.normal(size=(700, 3)), jnp.float32)
  out, vjp = jax.vjp(lambda x, y: matmul.matmul(x, y, jnp.bfloat16), x, y)
  exact = np.float64(x) @ np.float64(y.astype(jnp.bfloat16))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-3)
  g = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  x_bar, y_bar = vjp(g)
  assert (x_bar.dtype, y_bar.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = np.float64(g.astype(jnp.bfloat16))
  np.testing.assert_allclose(
    y_bar, np.float64(x).T @ rounded, rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize(
  'fields',
  [
    dict(position='rope2d', scan_layers=True, remat='dots'),
    dict(pooling='attention', activation='gelu_tanh'),
  ],
)
def test_every_parameter_has_a_gradient(fields):
  model = make(variant='Pico/7', **fields)
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)['params']
  target = jax.random.normal(jax.random.key(1), (3, 16))

  def total(params):
    return jnp.sum(
      model.apply({'params': params}, IMAGES)['embedding'] * target
    )

  gradients = jax.jit(jax.grad(total))(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert jnp.isfinite(gradient).all() and gradient.any(), path


def test_images_of_another_size_and_shape():
  model = make()
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  images = np.zeros((2, 21, 30, 3), np.uint8)  # Two columns are left over.
  out = jax.jit(model.apply)(variables, images)
  assert out['tokens'].shape == (2, 13, 96)


def test_rotary_positions_need_heads_that_four_divides(monkeypatch):
  odd = dict(width=18, depth=1, heads=3, mlp_dim=8)
  monkeypatch.setitem(vit.VARIANTS, 'odd', odd)
  assert make(variant='odd/7').width == 18
  with pytest.raises(errors.UserError, match='model.position=rope2d'):
    make(variant='odd/7', position='rope2d')
