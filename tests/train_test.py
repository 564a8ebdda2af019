"""Training: resume, meshes, and what stops it."""

import json
import shutil

import jax
import numpy as np
import pytest

from mlcd_jax import checkpoint
from mlcd_jax import errors
from mlcd_jax import hardware
from mlcd_jax import labels
from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax import train
from mlcd_jax import train_step


@pytest.fixture(scope='module', name='clustered')
def fixture_clustered(tmp_path_factory):
  return tmp_path_factory.mktemp('clustered')


@pytest.fixture(name='start')
def fixture_start(tiny_config, clustered):
  """(workdir, mesh, **config) -> trains on the same clusters."""
  stages.run(tiny_config, clustered, ('embed', 'cluster'))
  made = manifests.load(clustered / 'clusters')

  def start(workdir, mesh=None, **changes):
    tiny_config.update_from_flattened_dict(changes)
    workdir.mkdir(exist_ok=True)
    manifest = manifests.open_for(
      'train', workdir / 'checkpoints', config={}, inputs={}
    )
    train.run(
      tiny_config,
      manifest,
      workdir=workdir,
      embedded=manifests.load(clustered / 'embeddings'),
      labels=labels.Labels(made),
      mesh=mesh or two_devices(),
    )
    return manifest

  return start


def two_devices():
  return sharding.make_mesh(2, 1, devices=jax.devices()[:2])


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {r['step']: r['train/loss'] for r in map(json.loads, lines)}


def final_params(workdir, config):
  program = train_step.Program(
    config=config,
    num_classes=config.cluster.num_centers,
    steps=config.train.steps,
    mesh=two_devices(),
  )
  folder = workdir / 'checkpoints'
  checkpointer = checkpoint.Checkpointer(folder)
  state = checkpointer.restore(
    checkpoint.latest_step(folder), program.abstract_state
  )
  checkpointer.close()
  return jax.tree.map(np.asarray, state.params)


def test_stopped_and_continued_is_bit_equal(start, tiny_config, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert start(whole).complete
  assert not start(parts, **{'train.stop_after_steps': 5}).complete
  assert checkpoint.latest_step(parts / 'checkpoints') == 5
  assert not start(parts).complete
  assert checkpoint.latest_step(parts / 'checkpoints') == 10
  assert start(parts).complete
  assert losses(whole) == losses(parts)
  assert list(losses(whole)) == list(range(1, 13))
  jax.tree.map(
    np.testing.assert_array_equal,
    final_params(whole, tiny_config),
    final_params(parts, tiny_config),
  )


def test_continues_from_the_last_whole_checkpoint(start, tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  start(whole)
  start(killed, **{'train.stop_after_steps': 8})
  # A kill after step 4 was saved, while step 8 was being written.
  folder = killed / 'checkpoints'
  shutil.move(folder / '8', folder / '8.orbax-checkpoint-tmp')
  assert checkpoint.latest_step(folder) == 4
  start(killed, **{'train.stop_after_steps': 0})
  assert losses(whole) == losses(killed)


@pytest.mark.parametrize('sample_rate', [1.0, 0.1])
def test_meshes_give_the_same_loss_curve(start, tmp_path, sample_rate):
  curves = {}
  for devices, shape in ((1, (1, 1)), (8, (2, 4))):
    workdir = tmp_path / f'{shape}'
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:devices])
    start(workdir, mesh, **{'train.steps': 20, 'loss.sample_rate': sample_rate})
    curves[shape] = np.array(list(losses(workdir).values()))
    assert len(curves[shape]) == 20
  for curve in curves.values():
    np.testing.assert_allclose(curve, curves[1, 1], rtol=1e-4)


def test_loss_falls(start, tmp_path):
  start(tmp_path, **{'train.steps': 50, 'optimizer.learning_rate': 2e-3})
  curve = list(losses(tmp_path).values())
  assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.5


def test_utilisation_is_logged_where_the_peak_is_known(
  start, tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(hardware, 'peak_flops', lambda devices: 1e15)
  start(tmp_path, **{'train.steps': 3})
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  flops = sum(hardware.train_flops(tiny_config, 64).values())
  for values in map(json.loads, lines[1:]):
    assert values['train/model_flop_utilisation'] == pytest.approx(
      values['train/images_per_second'] * flops / 1e15
    )


def test_bfloat16_stays_close_to_float32(start, tmp_path):
  start(tmp_path / 'a')
  start(tmp_path / 'b', **{'model.dtype': 'bfloat16'})
  a, b = (list(losses(tmp_path / name).values()) for name in 'ab')
  assert a != b
  np.testing.assert_allclose(a, b, rtol=2e-2)


def test_state_is_sharded_as_its_parameters(tiny_config):
  tiny_config.model.variant = 'S/14'  # Large enough for FSDP.
  program = train_step.Program(
    config=tiny_config, num_classes=1_500, steps=10,
    mesh=sharding.make_mesh(2, 4),
  )  # fmt: skip
  state = program.init()
  adam = next(s for s in state.opt_state if hasattr(s, 'mu'))
  jax.tree.map(
    lambda p, m: np.testing.assert_equal(m.sharding.spec, p.sharding.spec),
    state.params,
    adam.mu,
  )
  classifier = state.params['classifier']['weight']
  assert classifier.sharding.spec == sharding.CLASSES
  assert classifier.addressable_shards[0].data.shape[0] == 2_048 // 8
  kernel = state.params['encoder']['block_00']['mlp_in']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_other_images_than_were_labelled_stop(start, tmp_path):
  with pytest.raises(
    errors.UserError, match='200 images have no labels .such as test'
  ):
    start(tmp_path, **{'data.split': 'test[:200]'})


def test_non_finite_loss_stops(start, tmp_path):
  broken = {
    'optimizer.learning_rate': float('inf'),
    'optimizer.warmup_steps': 0.0,
    'train.steps': 2,
    'train.checkpoint_every_steps': 1,
  }
  for _ in range(2):  # Nor does the same command again call it done.
    with pytest.raises(errors.RunError, match='train/.* is nan at step 2'):
      start(tmp_path, **broken)
    assert checkpoint.latest_step(tmp_path / 'checkpoints') == 1


def test_epochs_become_steps(tiny_config):
  tiny_config.train.steps, tiny_config.train.epochs = 0, 2.0
  assert train.num_steps(tiny_config, 3_500) == 219
