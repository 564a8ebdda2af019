"""Training: resume, meshes, and what stops it."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.cluster import labels
from mlcd_jax.config import sizes
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.models import vit
from mlcd_jax.runtime import chips
from mlcd_jax.runtime import errors
from mlcd_jax.train import flops as flops_lib
from mlcd_jax.train import stage as train
from mlcd_jax.train import step as step_lib
from mlcd_jax.weights import checkpoint
from tests import commands


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


@pytest.fixture(scope='module', name='whole_folder')
def fixture_whole_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('whole')


@pytest.fixture(name='whole')
def fixture_whole(start, whole_folder):
  """The workdir of a finished run; made once, and only read."""
  if not (whole_folder / 'metrics.jsonl').exists():
    assert start(whole_folder).complete
  return whole_folder


def two_devices():
  return sharding.make_mesh(2, 1, devices=jax.devices()[:2])


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {r['step']: r['train/loss'] for r in map(json.loads, lines)}


def final_params(workdir, config):
  program = step_lib.Program(
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


def test_stopped_and_continued_is_bit_equal(
  start, whole, tiny_config, tmp_path
):
  parts = tmp_path / 'parts'
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


def test_continues_from_the_last_whole_checkpoint(start, whole, tmp_path):
  killed = tmp_path / 'killed'
  start(killed, **{'train.stop_after_steps': 8})
  # A kill after step 4 was saved, while step 8 was being written.
  folder = killed / 'checkpoints'
  shutil.move(folder / '8', folder / '8.orbax-checkpoint-tmp')
  assert checkpoint.latest_step(folder) == 4
  start(killed, **{'train.stop_after_steps': 0})
  assert losses(whole) == losses(killed)


@pytest.mark.parametrize(
  'sample_rate', [pytest.param(1.0, marks=pytest.mark.slow), 0.1]
)
def test_meshes_give_the_same_loss_curve(start, tmp_path, sample_rate):
  curves = {}
  for devices, shape in ((1, (1, 1)), (8, (2, 4))):
    workdir = tmp_path / f'{shape}'
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:devices])
    start(
      workdir,
      mesh,
      **{'loss.sample_rate': sample_rate, 'train.checkpoint_every_steps': 1000},
    )
    curves[shape] = np.array(list(losses(workdir).values()))
    assert len(curves[shape]) == 12
  for curve in curves.values():
    np.testing.assert_allclose(curve, curves[1, 1], rtol=1e-4)


def test_loss_falls(start, tmp_path):
  start(
    tmp_path,
    **{
      'train.steps': 50,
      'train.checkpoint_every_steps': 1000,
      'optimizer.learning_rate': 2e-3,
    },
  )
  curve = list(losses(tmp_path).values())
  assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.5


def test_utilisation_is_logged_where_the_peak_is_known(
  start, tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(chips, 'peak_flops', lambda devices: 1e15)
  start(tmp_path, **{'train.steps': 3})
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  flops = sum(flops_lib.train_flops(tiny_config, 64).values())
  for values in map(json.loads, lines[1:]):
    assert values['train/model_flop_utilisation'] == pytest.approx(
      values['train/images_per_second'] * flops / 1e15
    )


def test_bfloat16_stays_close_to_float32(start, whole, tmp_path):
  start(tmp_path, **{'model.dtype': 'bfloat16'})
  a, b = (list(losses(workdir).values()) for workdir in (whole, tmp_path))
  assert a != b
  np.testing.assert_allclose(a, b, rtol=2e-2)


def test_state_is_sharded_as_its_parameters(tiny_config, monkeypatch):
  # Large enough for FSDP.
  wide = vit.VARIANTS['S'] | dict(depth=1)
  monkeypatch.setitem(vit.VARIANTS, 'Wide', wide)
  tiny_config.model.variant = 'Wide/14'
  program = step_lib.Program(
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


class Poisoned:
  """A step whose loss is multiplied, by NaN if not said, where it is told."""

  def __init__(self, monkeypatch, *steps, by=float('nan')):
    loss = step_lib.classifier.loss

    def poisoned(w, x, labels, *, key, **options):
      # The key is folded from the step, so that it tells which one it is.
      keys = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), step - 1)
        for step in steps
      ]
      bad = sum(
        jax.numpy.all(jax.random.key_data(k) == jax.random.key_data(key))
        for k in keys
      )
      found = loss(w, x, labels, key=key, **options)
      return found * jax.numpy.where(bad > 0, by, 1.0)

    monkeypatch.setattr(step_lib.classifier, 'loss', poisoned)


def test_a_batch_that_is_not_finite_is_named(
  start, tmp_path, monkeypatch, tiny_config
):
  Poisoned(monkeypatch, 3)
  with pytest.raises(errors.RunError, match='nan at step 3, on a batch with'):
    start(tmp_path)
  named = (tmp_path / 'not_finite_3.txt').read_text().splitlines()
  # What the pipeline itself reads in that step.
  read = []
  source = sources.make(tiny_config.data)

  class Recorded:
    def __len__(self):
      return len(source)

    def __getitem__(self, i):
      read.append(source[i]['key'])
      return source[i]

    def keys(self):
      return source.keys()

  next(
    pipelines.train_batches(
      Recorded(),
      np.arange(len(source)),
      np.zeros((len(source), 1), np.int32),
      num_positives=1,
      batch_size=32,
      image_size=28,
      crop_area=(0.5, 1.0),
      flip=False,
      seed=tiny_config.seed,
      start_step=2,
    )
  )
  assert read[:32] == named


def test_batches_that_are_not_finite_are_skipped(
  start, tmp_path, monkeypatch, tiny_config
):
  Poisoned(monkeypatch, 3, 5)
  assert start(tmp_path / 'a', **{'train.max_skipped_steps': 2}).complete
  lines = (tmp_path / 'a/metrics.jsonl').read_text().splitlines()
  skipped = [json.loads(line)['train/skipped_steps'] for line in lines]
  assert skipped == [0, 0, 1, 1] + [2] * 8
  params = final_params(tmp_path / 'a', tiny_config)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  with pytest.raises(errors.RunError, match='step 5.*max_skipped_steps=1'):
    start(tmp_path / 'b', **{'train.max_skipped_steps': 1})


def test_skipping_changes_nothing_else(start, whole, tmp_path):
  start(tmp_path, **{'train.max_skipped_steps': 3})
  np.testing.assert_allclose(
    list(losses(whole).values()),
    list(losses(tmp_path).values()),
    rtol=1e-6,
  )


def test_saves_by_the_clock(start, tmp_path):
  start(
    tmp_path,
    **{
      'train.checkpoint_every_minutes': 1e-9,
      'train.checkpoint_every_steps': 1000,
      'train.keep_checkpoints': 100,
    },
  )
  saved = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert saved == {'manifest.json', *map(str, range(1, 13))}


def test_keeps_the_last_every_so_many_and_the_best(start, tmp_path):
  start(
    tmp_path,
    **{
      'train.checkpoint_every_minutes': 1e-9,
      'train.checkpoint_every_steps': 1000,
      'train.keep_checkpoints': 2,
      'train.keep_every_steps': 5,
      'train.keep_best': 'train/loss',
      'train.best_is': 'highest',
    },
  )
  curve = losses(tmp_path)
  best = max(curve, key=curve.get)
  assert best not in (5, 10, 11, 12)
  saved = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert saved == {'manifest.json', '5', '10', '11', '12', str(best)}


def test_a_spike_is_left_out(start, tmp_path, monkeypatch, tiny_config):
  Poisoned(monkeypatch, 3, 6, by=100.0)
  spikes = {'train.max_loss_ratio': 2.0}
  start(tmp_path / 'a', **spikes, **{'train.max_skipped_steps': 2})
  lines = (tmp_path / 'a/metrics.jsonl').read_text().splitlines()
  values = [json.loads(line) for line in lines]
  assert [v['train/spike'] for v in values] == [0, 0, 1, 0, 0, 1] + [0] * 6
  assert values[-1]['train/skipped_steps'] == 2
  # What follows does not know of them.
  assert values[3]['train/loss'] < 1.1 * values[1]['train/loss']
  assert len((tmp_path / 'a/spike_3.txt').read_text().splitlines()) == 32
  with pytest.raises(errors.RunError, match='at step 3, a spike by train.max'):
    start(tmp_path / 'b', **spikes, **{'train.max_skipped_steps': 0})


def test_a_rule_for_spikes_changes_nothing_else(
  start, whole, tmp_path, tiny_config
):
  off = tiny_config.train.max_loss_ratio
  start(tmp_path, **{'train.max_loss_ratio': 2.0})
  assert off == 0
  np.testing.assert_allclose(
    list(losses(whole).values()),
    list(losses(tmp_path).values()),
    rtol=1e-6,
  )


def test_goes_on_where_devices_do_not_divide_the_classes(start, tmp_path):
  """Two devices, then three, then two, against two all the way."""
  changes = {'train.steps': 6, 'train.batch_size': 24, 'loss.sample_rate': 0.1}
  start(tmp_path / 'whole', **changes)
  for devices in (2, 3, 2):
    start(
      tmp_path / 'moved',
      sharding.make_mesh(devices, 1, devices=jax.devices()[:devices]),
      **changes | {'train.stop_after_steps': 2},
    )
  whole, moved = losses(tmp_path / 'whole'), losses(tmp_path / 'moved')
  assert list(whole) == list(moved) == list(range(1, 7))
  np.testing.assert_allclose(
    list(moved.values()), list(whole.values()), rtol=1e-5
  )


_ON_DEVICES = """
import json, pathlib, sys
import jax
from mlcd_jax import stages
from tests import conftest
devices = int(sys.argv[2])
jax.config.update('jax_num_cpu_devices', devices)  # conftest says eight.
assert jax.device_count() == devices
config = conftest.tiny_config.__wrapped__()
config.train.steps, config.train.batch_size = 4, 240
config.evaluate.batch_size = 240
stages.run(config, pathlib.Path(sys.argv[1]), ('embed', 'cluster', 'train'))
"""


# MLCD_JAX_DEVICES=80 is the paper's number; it takes minutes on two cores.
_MANY = int(os.environ.get('MLCD_JAX_DEVICES', '24'))


@pytest.mark.slow
@pytest.mark.alone
def test_many_devices_as_one(tmp_path):
  """Neither 24 nor 80 divides the 1,024 blocks of classes."""
  curves = []
  for devices in (1, _MANY):
    workdir = tmp_path / str(devices)
    code, _, err = commands.run(
      workdir, devices, script=_ON_DEVICES, timeout=1_200
    )
    assert code == 0, err[-3000:]
    curves.append(list(losses(workdir).values()))
  assert len(curves[0]) == 4
  np.testing.assert_allclose(*curves, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('sample_rate', [1.0, 0.1])
def test_goes_on_with_other_devices(start, tmp_path, sample_rate):
  """8 devices, then 4, 2 and 1 in other splits, against 8 all the way."""
  changes = {
    'train.steps': 50,
    'loss.sample_rate': sample_rate,
    'optimizer.learning_rate': 1e-4,
  }
  start(tmp_path / 'whole', sharding.make_mesh(4, 2), **changes)
  for devices, shape in ((8, (4, 2)), (4, (1, 4)), (2, (2, 1)), (1, (1, 1))):
    start(
      tmp_path / 'moved',
      sharding.make_mesh(*shape, devices=jax.devices()[:devices]),
      **changes | {'train.stop_after_steps': 10 if devices > 1 else 0},
    )
  whole, moved = losses(tmp_path / 'whole'), losses(tmp_path / 'moved')
  assert list(whole) == list(moved) == list(range(1, 51))
  np.testing.assert_allclose(
    list(moved.values()), list(whole.values()), rtol=1e-5
  )


def test_epochs_become_steps(tiny_config):
  tiny_config.train.steps, tiny_config.train.epochs = 0, 2.0
  assert sizes.num_steps(tiny_config, 3_500) == 219
  tiny_config.train.min_steps = 300
  assert sizes.num_steps(tiny_config, 3_500) == 300
  assert sizes.num_steps(tiny_config, 35_000) == 2_188
  tiny_config.train.steps = 7
  assert sizes.num_steps(tiny_config, 3_500) == 7
