"""A ResNet in training and after it, and its running averages."""

import json

from flax import traverse_util
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.runtime import errors
from mlcd_jax.train import init
from mlcd_jax.train import step as step_lib
from mlcd_jax.weights import checkpoint
from mlcd_jax.weights import export
from mlcd_jax.weights import huggingface

QUICK = {'xla_backend_optimization_level': 0}
STEPS = 4


@pytest.fixture(name='config')
def fixture_config(tiny_config):
  tiny_config.model.variant = 'resnet_nano'
  tiny_config.model.image_size = 32
  tiny_config.train.steps = STEPS
  tiny_config.train.batch_size = 32
  tiny_config.train.accumulate_steps = 2
  tiny_config.train.ema_decay = 0.5
  tiny_config.evaluate.tasks = ('knn',)
  return tiny_config


def make_program(config, *shape):
  devices = jax.devices()[: np.prod(shape)]
  return step_lib.Program(
    config=config,
    num_classes=config.cluster.num_centers,
    steps=STEPS,
    mesh=sharding.make_mesh(*shape, devices=devices),
  )


def make_batch(program, seed):
  rng = np.random.default_rng(seed)
  batch = {
    'image': rng.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8),
    'labels': rng.integers(0, 64, (32, 8)).astype(np.int32),
    'weight': (np.arange(32) % 9 > 0).astype(np.float32),
  }
  return sharding.put_batch(program.mesh, batch)


def compiled(program):
  arguments = program.abstract_state, program.abstract_batch
  return program.step.lower(*arguments).compile(QUICK)


def flatten(tree):
  return traverse_util.flatten_dict(jax.device_get(tree), sep='/')


def averages(encoder):
  return {
    path: value
    for path, value in flatten(encoder).items()
    if path.endswith(('mean', 'variance'))
  }


@pytest.mark.slow
def test_averages_are_of_the_whole_batch_and_survive_a_stop(config, tmp_path):
  alone, program = make_program(config, 1, 1), make_program(config, 2, 4)
  start = jax.device_get(alone.init())
  fresh = averages(start.params['encoder'])

  state, metrics = compiled(alone)(start, make_batch(alone, 0))
  loss, expected = float(metrics['train/loss']), state.params['encoder']

  shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
  step, state = compiled(program), jax.device_put(start, shardings)
  state, metrics = step(state, make_batch(program, 0))
  assert float(metrics['train/loss']) == pytest.approx(loss, rel=1e-5)
  found, average = averages(state.params['encoder']), averages(state.ema)
  for path, value in averages(expected).items():
    np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6)
    assert (value != fresh[path]).all(), path
    # (1 + 0) / (10 + 0) of the old, which is less than the decay.
    mixed = 0.1 * fresh[path] + 0.9 * value
    np.testing.assert_allclose(average[path], mixed, rtol=1e-4, atol=1e-6)

  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, state)
  checkpointer.close()
  state, _ = step(state, make_batch(program, 1))
  checkpointer = checkpoint.Checkpointer(tmp_path)
  continued, _ = checkpointer.restore_latest(program.abstract_state)
  checkpointer.close()
  continued, _ = step(continued, make_batch(program, 1))
  jax.tree.map(np.testing.assert_array_equal, continued, state)


def test_exports_to_transformers_only(config, tmp_path):
  model = models.make(config.model)
  params = make_program(config, 1, 1).init_encoder()
  export.to_huggingface(tmp_path / 'a', model, {'params': params})
  tensors = safetensors_numpy.load_file(tmp_path / 'a/model.safetensors')
  exported = [name for name in tensors if not name.endswith('tracked')]
  assert len(exported) == len(flatten(params)) - 1  # It has no projection.
  assert 'ResNetModel' in (tmp_path / 'a/README.md').read_text()
  for layout in ('timm', 'open_clip'):
    with pytest.raises(errors.UserError, match='is written for ViTs only'):
      export.to_huggingface(
        tmp_path / layout, model, {'params': params}, layout=layout
      )


@pytest.mark.slow
def test_whole_run(config, tmp_path):
  """All stages, stopped and continued, exported, and started from."""
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  config.evaluate.tasks = ('knn', 'finetune')
  config.evaluate.finetune_epochs = 1.0
  stages.run(config, whole)
  results = json.loads((whole / 'results.json').read_text())
  for name in ('trained', 'random'):
    assert results[f'{name}/digits/knn/accuracy'] > 0.15
    assert f'{name}/digits/finetune/accuracy' in results
  assert '"patches":[{' in (whole / 'report.html').read_text()

  config.cluster.path = str(whole)
  for steps in (STEPS // 2, 0):
    config.train.stop_after_steps = steps
    stages.run(config, parts, ('train',))
  params = huggingface.abstract_params(models.make(config.model))
  wanted = {'params': {'encoder': params}, 'ema': params}
  found, expected = (
    checkpoint.restore_part(workdir / 'checkpoints', STEPS, wanted)
    for workdir in (parts, whole)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)

  export.export(str(whole), tmp_path / 'exported')
  tensors = safetensors_numpy.load_file(tmp_path / 'exported/model.safetensors')
  np.testing.assert_array_equal(
    tensors['embedder.embedder.normalization.running_var'],
    expected['ema']['stem_norm']['variance'],
  )

  config.model.init_from, config.model.image_size = str(whole), 64
  state = init.make(make_program(config, 1, 1), clusters=whole / 'clusters')
  jax.tree.map(
    np.testing.assert_array_equal, state.params['encoder'], expected['ema']
  )
  config.model.variant = 'Nano/16'
  with pytest.raises(errors.UserError, match='its width is 16.*model.variant'):
    init.make(make_program(config, 1, 1), clusters=whole / 'clusters')
