"""A ResNet through all stages: what its running averages must hold for."""

import json

from flax import traverse_util
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mlcd_jax import checkpoint
from mlcd_jax import convert
from mlcd_jax import encoders
from mlcd_jax import errors
from mlcd_jax import initial
from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax import train_step

STEPS = 4


@pytest.fixture(name='config')
def fixture_config(tiny_config):
  tiny_config.model.variant = 'resnet_nano'
  tiny_config.model.image_size = 32
  tiny_config.train.steps = STEPS
  tiny_config.train.batch_size = 64
  tiny_config.train.accumulate_steps = 2
  tiny_config.train.ema_decay = 0.5
  tiny_config.evaluate.tasks = ('knn',)
  return tiny_config


@pytest.fixture(scope='module', name='folder')
def fixture_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('resnet') / 'run'


@pytest.fixture(name='run')
def fixture_run(config, folder):
  """A finished run; made once, and only read."""
  stages.run(config, folder)
  return folder


def program(config, *shape):
  devices = jax.devices()[: np.prod(shape)]
  return train_step.Program(
    config=config,
    num_classes=config.cluster.num_centers,
    steps=STEPS,
    mesh=sharding.make_mesh(*shape, devices=devices),
  )


def final(workdir, config):
  """The last checkpoint's encoder and its moving average, by path."""
  params = convert.abstract_params(models.make(config.model))
  state = checkpoint.restore_part(
    workdir / 'checkpoints',
    STEPS,
    {'params': {'encoder': params}, 'ema': params},
  )
  parts = jax.device_get((state['params']['encoder'], state['ema']))
  return [traverse_util.flatten_dict(part, sep='/') for part in parts]


def test_averages_move_and_are_averaged(run, config):
  fresh = program(config, 1, 1).init_encoder()
  fresh = traverse_util.flatten_dict(fresh, sep='/')
  params, average = final(run, config)
  for path, value in params.items():
    assert np.isfinite(value).all()
    if path.endswith(('mean', 'variance')):
      assert (value != fresh[path]).all(), path
      assert (value != average[path]).any(), path
  results = json.loads((run / 'results.json').read_text())
  for encoder in ('trained', 'random'):
    assert results[f'{encoder}/digits/knn/accuracy'] > 0.2


def test_stopped_and_continued_is_bit_equal(run, config, tmp_path):
  config.cluster.path = str(run)
  for steps in (STEPS // 2, 0):
    config.train.stop_after_steps = steps
    stages.run(config, tmp_path, ('train',))
  for found, expected in zip(final(tmp_path, config), final(run, config)):
    assert set(found) == set(expected)
    for path, value in expected.items():
      np.testing.assert_array_equal(found[path], value)


def test_averages_are_of_the_whole_batch_on_any_mesh(config):
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8),
    'labels': rng.integers(0, 64, (64, 8)).astype(np.int32),
    'weight': (np.arange(64) % 9 > 0).astype(np.float32),
  }
  found = []
  for shape in ((1, 1), (2, 4)):
    step = program(config, *shape)
    state, metrics = step.step(
      step.init(), sharding.put_batch(step.mesh, batch)
    )
    encoder = jax.device_get(state.params['encoder'])
    found.append((traverse_util.flatten_dict(encoder, sep='/'), metrics))
  (one, one_metrics), (eight, eight_metrics) = found
  assert eight_metrics['train/loss'] == pytest.approx(
    one_metrics['train/loss'], rel=1e-5
  )
  for path, value in one.items():
    if path.endswith(('mean', 'variance')):
      np.testing.assert_allclose(eight[path], value, rtol=1e-4, atol=1e-6)


def test_exports_what_evaluation_uses(run, config, tmp_path):
  encoders.export(str(run), tmp_path / 'exported')
  tensors = safetensors_numpy.load_file(tmp_path / 'exported/model.safetensors')
  _, average = final(run, config)
  np.testing.assert_array_equal(
    tensors['embedder.embedder.normalization.running_var'],
    average['stem_norm/variance'],
  )
  assert len(tensors) == len(average) - 1  # It has no projection.
  assert 'ResNetModel' in (tmp_path / 'exported/README.md').read_text()
  with pytest.raises(errors.UserError, match='timm is written for ViTs only'):
    encoders.export(str(run), tmp_path / 'timm', layout='timm')


def test_starts_a_resnet_and_no_vit(run, config):
  config.model.init_from = str(run)
  config.model.image_size = 64
  state = initial.make(program(config, 1, 1), clusters=run / 'clusters')
  encoder = traverse_util.flatten_dict(state.params['encoder'], sep='/')
  for path, value in final(run, config)[1].items():
    np.testing.assert_array_equal(encoder[path], value)
  config.model.variant = 'Nano/16'
  with pytest.raises(
    errors.UserError, match='its width is 16.*set model.variant'
  ):
    initial.make(program(config, 1, 1), clusters=run / 'clusters')
