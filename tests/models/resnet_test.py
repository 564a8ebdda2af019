"""ResNets: sizes, numbers recorded from transformers, and their statistics.

The recorder is tests/weights/oracles.py.
"""

import functools
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax import optimizer
from mlcd_jax.models import batch_norm
from mlcd_jax.models import resnet
from mlcd_jax.runtime import errors
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import layouts

QUICK = {'xla_backend_optimization_level': 0}
GOLDEN = np.load(
  pathlib.Path(__file__).parent.parent / 'goldens/resnet/golden.npz'
)
# Of the sizes that were recorded.
SMALL = resnet.ResNet(
  width=4, blocks=(2, 1), embedding_dim=0, dtype=jnp.float32
)


def make(**fields):
  config = config_lib.default().model
  config.update(
    variant='resnet_nano', image_size=32, embedding_dim=16, pooling='average'
  )
  config.update(fields)
  return models.make(config)


def flatten(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def recorded(prefix):
  """The parameters of SMALL in the archive."""
  pixels = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  shapes = jax.eval_shape(SMALL.init, jax.random.key(0), pixels)['params']
  return traverse_util.unflatten_dict(
    {
      path: part.to_ours(
        GOLDEN[f'{prefix}/{part.name}'], flatten(shapes)[path].shape
      )
      for path, (part,) in layouts.of_images('resnet', SMALL).items()
    },
    sep='/',
  )


@functools.partial(jax.jit, compiler_options=QUICK)
def train(params, pixels, weight_B):
  """Outputs, and parameters whose averages took in the batch."""
  out, seen = SMALL.apply(
    {'params': params},
    pixels,
    weight_B=weight_B,
    mutable=batch_norm.STATISTICS,
  )
  return out, batch_norm.follow(params, seen[batch_norm.STATISTICS])


def assert_close(found, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_has_the_published_size():
  params = dict(huggingface.abstract_params(make(variant='resnet50')))
  del params['projection']
  sizes = dict.fromkeys(('kernel', 'scale', 'bias', 'mean', 'variance'), 0)
  for path, x in flatten(params).items():
    sizes[path.rpartition('/')[2]] += x.size
  learned = sizes['kernel'] + sizes['scale'] + sizes['bias']
  # torchvision's count, of which the head is of 1,000 classes.
  assert learned == 25_557_032 - (2_048 + 1) * 1_000
  assert sizes['mean'] == sizes['variance'] == sizes['scale']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_shapes_and_types(dtype):
  out, variables = jax.eval_shape(
    make(dtype=dtype).init_with_output,
    jax.random.key(0),
    jax.ShapeDtypeStruct((3, 64, 33, 3), jnp.uint8),
  )
  assert {k: v.shape for k, v in out.items()} == {
    'hidden': (3, 40, 128),
    'tokens': (3, 40, 128),
    'pooled': (3, 128),
    'embedding': (3, 16),
  }
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((out, variables)))
  assert set(variables) == {'params'}


def test_agrees_with_transformers():
  params, pixels = recorded('before'), GOLDEN['pixels']
  out = jax.jit(SMALL.apply, compiler_options=QUICK)({'params': params}, pixels)
  trained, found = train(params, pixels, np.ones(3))
  for name in ('hidden', 'pooled'):
    assert_close(out[name], GOLDEN[f'before/{name}'])
    assert_close(trained[name], GOLDEN[f'after/{name}'])
  expected = flatten(recorded('after'))
  assert set(flatten(found)) == set(expected)
  for path, value in flatten(found).items():
    if not path.endswith('variance'):
      np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-6)
  # PyTorch averages variances over n - 1, of n = 3 * 9 * 11 at the stem.
  path = 'stem_norm/variance'
  kept = 0.9 * flatten(params)[path]
  np.testing.assert_allclose(
    flatten(found)[path], kept + (expected[path] - kept) * 296 / 297, rtol=1e-5
  )


def test_images_of_no_weight_are_not_in_the_statistics():
  params, pixels = recorded('before'), GOLDEN['pixels']
  other = np.array(pixels)
  other[1] = 7.0
  weight_B = np.array([1.0, 0.0, 1.0])
  out, found = train(params, pixels, weight_B)
  expected_out, expected = train(params, other, weight_B)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_array_equal(out['pooled'][::2], expected_out['pooled'][::2])
  assert (out['pooled'][1] != expected_out['pooled'][1]).any()

  out, found = train(params, pixels, np.zeros(3))
  assert_close(out['pooled'], GOLDEN['before/pooled'])
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_every_parameter_has_a_gradient_but_the_averages():
  model = SMALL.clone(remat='full')

  def loss(params):
    out, _ = model.apply(
      {'params': params},
      GOLDEN['pixels'],
      weight_B=np.ones(3),
      mutable=batch_norm.STATISTICS,
    )
    return jnp.sum(out['embedding'] ** 3)

  gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)(
    recorded('before')
  )
  for path, gradient in flatten(gradients).items():
    assert gradient.any() != path.endswith(('mean', 'variance')), path


def test_averages_that_are_used_have_no_gradient_either():
  norm = batch_norm.BatchNorm(jnp.float32)
  x = jnp.ones((1, 1, 1, 2))
  variables = norm.init(jax.random.key(0), x)
  gradients = jax.grad(lambda v: jnp.sum(norm.apply(v, x)))(variables)['params']
  assert {name for name, x in gradients.items() if x.any()} == {'scale', 'bias'}


def test_kernels_are_decayed_and_nothing_else():
  decayed = flatten(optimizer.decayed(recorded('before')))
  names = {path.rpartition('/')[2] for path, yes in decayed.items() if yes}
  assert names == {'kernel'}


@pytest.mark.parametrize(
  'fields',
  [
    dict(pooling='class_token'),
    dict(position='rope2d'),
    dict(activation='quick_gelu'),
    dict(scan_layers=True),
    dict(drop_path=0.1),
    dict(remat='dots'),
    dict(image_size=28),
  ],
)
def test_what_it_has_not_is_refused(fields):
  (field,) = fields
  with pytest.raises(errors.UserError, match=f'model.{field}=.*resnet_nano'):
    make(**fields)
