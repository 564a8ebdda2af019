"""The step: what must not change its numbers, and what must."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import sharding
from mlcd_jax.runtime import errors
from mlcd_jax.train import classifier
from mlcd_jax.train import sampling
from mlcd_jax.train import step as step_lib

NUM_CLASSES = 300
_QUICK = {'xla_backend_optimization_level': 0}


_cache = {}


@pytest.fixture(name='step')
def fixture_step(tiny_config):
  """(**config fields) -> the states of two steps on two devices, metrics."""
  tiny_config.cluster.num_centers = NUM_CLASSES
  tiny_config.model.variant = 'Pico/14'
  tiny_config.train.batch_size = 16
  tiny_config.optimizer.warmup_steps = 1
  tiny_config.loss.sample_rate = 0.2

  def run(**fields):
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    program = step_lib.Program(
      config=config,
      num_classes=NUM_CLASSES,
      steps=10,
      mesh=sharding.make_mesh(2, 1, devices=jax.devices()[:2]),
    )
    if 'start' not in _cache:  # No field of these tests changes it.
      _cache['start'] = jax.tree.map(np.asarray, program.init())
    state = _cache['start']
    if config.train.ema_decay:
      state = state.replace(ema=state.params['encoder'])
    batch = make_batch(step_lib.num_labels(config))
    compiled = program.step.lower(
      program.abstract_state, program.abstract_batch
    ).compile(_QUICK)
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    states, metrics = [state], []
    for _ in range(2):
      state, values = compiled(
        jax.device_put(states[-1], shardings),
        sharding.put_batch(program.mesh, batch),
      )
      states.append(jax.tree.map(np.asarray, state))
      metrics.append({k: float(v) for k, v in values.items()})
    return states, metrics

  return run


def make_batch(num_labels):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, NUM_CLASSES, (16, 10)).astype(np.int32)
  labels[5] = -1
  return {
    'image': rng.integers(0, 256, (16, 28, 28, 3)).astype(np.uint8),
    'labels': labels[:, :num_labels],
    'weight': (np.arange(16) % 7 > 0).astype(np.float32),
  }


def assert_close(found, expected, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance),
    found[-1].params,
    expected[-1].params,
  )


@pytest.fixture(name='plain')
def fixture_plain(step):
  if 'plain' not in _cache:
    _cache['plain'] = step()
  return _cache['plain']


@pytest.mark.parametrize(
  'fields',
  [
    {'model.remat': 'full', 'model.scan_layers': True},
    {
      'model.remat': 'dots',
      'train.accumulate_steps': 4,
      'loss.chunk_megabytes': 0.001,
    },
  ],
)
def test_how_it_is_computed_does_not_change_it(step, plain, fields):
  states, metrics = step(**fields)
  for a, b in zip(metrics, plain[1]):
    assert a['train/loss'] == pytest.approx(b['train/loss'], rel=1e-5)
  # Adam's first steps blow rounding up where gradients are near 0.
  assert_close(states, plain[0], 2e-4)


def test_bad_and_unlabelled_images_are_counted(plain):
  # 3 of weight 0 and one of the others without a label.
  assert plain[1][0]['train/images_without_labels'] == 4


def test_average_follows_the_encoder(step):
  states, _ = step(**{'train.ema_decay': 0.5})
  first, second = states[0], states[1]
  decay = 0.1  # (1 + 0) / (10 + 0), which is less.
  jax.tree.map(
    lambda ema, old, new: np.testing.assert_allclose(
      ema, decay * old + (1 - decay) * new, atol=1e-6
    ),
    second.ema,
    first.params['encoder'],
    second.params['encoder'],
  )
  assert second.encoder is second.ema


def test_sparse_leaves_other_classes_untouched(step):
  states, _ = step(
    **{
      'optimizer.head_update': 'sparse',
      'train.accumulate_steps': 2,
    }
  )
  old, new = (np.asarray(s.params['classifier']['weight']) for s in states[1:])
  moved = np.any(old != new, axis=1)
  # 60 drawn, and the positives; 1,024 rows hold 300 classes.
  assert 60 <= moved.sum() < 60 + 15 * 8
  for moment in ('mu', 'nu'):
    before, after = (
      next(
        np.asarray(getattr(s, moment)['classifier']['weight'])
        for s in state.opt_state
        if hasattr(s, moment)
      )
      for state in states[1:]
    )
    np.testing.assert_array_equal(np.any(before != after, axis=1), moved)


def test_dense_decays_every_class(plain):
  old, new = (s.params['classifier']['weight'] for s in plain[0][1:])
  assert np.all(np.any(old != new, axis=1))


@pytest.mark.parametrize('devices', [3, 6, 7])
def test_the_same_classes_on_devices_that_do_not_divide_them(
  tiny_config, devices
):
  weights = {}
  for count in (1, devices):
    program = step_lib.Program(
      config=tiny_config,
      num_classes=NUM_CLASSES,
      steps=1,
      mesh=sharding.make_mesh(count, 1, devices=jax.devices()[:count]),
    )
    state = program.abstract_state
    weight = state.params['classifier']['weight']
    assert weight.shape[0] % count == 0
    weights[count] = classifier.init(
      program._key(1), NUM_CLASSES, 4, num_devices=count
    )['weight']
    assert len(weights[count]) == weight.shape[0]
  whole = weights[1]
  np.testing.assert_array_equal(weights[devices][: len(whole)], whole)
  assert not weights[devices][len(whole) :].any()


def test_more_devices_than_blocks_of_classes_are_refused():
  classifier.check_devices(NUM_CLASSES, 1_000)
  with pytest.raises(errors.UserError, match='too few for 1,025 devices'):
    classifier.check_devices(NUM_CLASSES, 1_025)
  for devices in (24, 40, 48, 72, 80, 96, 192):  # 80: the paper's.
    classifier.check_devices(1_000_000, devices)
    layout = sampling.Layout(1_000_000)
    rows = layout.rows_over(devices)
    assert rows % (devices * layout.rows_per_block) == 0
    assert layout.rows <= rows < 1.02 * layout.rows


def test_random_labels_are_some_of_the_stored_ones(tiny_config):
  tiny_config.loss.label_choice = 'random'
  tiny_config.loss.num_positives = 3
  program = step_lib.Program(
    config=tiny_config, num_classes=64, steps=1, mesh=None
  )
  labels = np.tile(np.arange(10), (50, 1))
  labels[0, 3:] = -1
  batch = {'labels': jnp.asarray(labels), 'weight': jnp.ones(50)}
  first, second = (
    np.asarray(program._with_chosen_labels(batch, step)['labels'])
    for step in (0, 1)
  )
  assert sorted(first[0]) == [0, 1, 2]  # Padding is chosen last.
  assert all(len(set(row)) == 3 for row in first)
  assert set(first[1:].flat) == set(range(10))
  assert (first != second).any()


def test_drop_path_and_random_labels_change_it_and_frozen_parts_stay(
  step, plain
):
  states, metrics = step(
    **{
      'model.drop_path': 0.5,
      'loss.label_choice': 'random',
      'optimizer.multipliers': (('encoder/patches', 0.0),),
    }
  )
  assert metrics[0]['train/loss'] != plain[1][0]['train/loss']
  np.testing.assert_array_equal(
    states[0].params['encoder']['patches']['kernel'],
    states[2].params['encoder']['patches']['kernel'],
  )


def test_sharded_weights_gather_no_activations(tiny_config, monkeypatch):
  """With mesh.fsdp devices exchange weights and their gradients, not tokens.

  Left to itself the compiler gathers the tokens of the batch, sums products of
  parts of the weights over the devices, or cuts the tokens along the width.
  """
  monkeypatch.setattr(sharding, '_MIN_FSDP_SIZE', 1)
  tiny_config.model.update(dict(variant='Pico/14', scan_layers=True))
  # The classifier exchanges the embeddings of all images, which are smaller.
  tiny_config.model.embedding_dim = 8
  tiny_config.train.batch_size = 2_048
  program = step_lib.Program(
    config=tiny_config,
    num_classes=NUM_CLASSES,
    steps=10,
    mesh=sharding.make_mesh(2, 4),
  )
  lowered = program.step.lower(program.abstract_state, program.abstract_batch)
  text = lowered.compile(_QUICK).as_text()
  kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
  found = {'all-gather': [0], 'all-to-all': []}
  for shapes, kind in re.findall(rf' = (.*?) ({kinds})(?:-start)?\(', text):
    found.setdefault(kind, []).extend(
      np.prod([int(d) for d in dims.split(',') if d])
      for dims in re.findall(r'f32\[([\d,]*)\]', shapes)
    )
  patches = 14 * 14 * 3 * program.model.width  # The largest weight.
  assert max(found['all-gather']) >= patches
  tokens = 2_048 // 8 * 4 * program.model.width  # Of one device.
  assert max(size for sizes in found.values() for size in sizes) < tokens
  assert not found['all-to-all']
