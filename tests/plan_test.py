"""The plan: its collectives, FLOPs, advice, and one real compile."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import plan
from mlcd_jax.config import presets
from mlcd_jax.runtime import chips
from mlcd_jax.runtime import hlo
from mlcd_jax.train import flops

_ROOT = pathlib.Path(__file__).parent.parent

_HLO = """
HloModule step
%body (p: (s32[])) -> (s32[]) {
  %g = f32[8,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %r = (s32[]) tuple(%i)
}
%cond (p: (s32[])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%a, %n)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %v = (s32[]) while(%w), condition=%cond, body=%body
  %s = (bf16[16]{0}, bf16[64]{0}) all-gather-start(%y), dimensions={0}
  %d = bf16[64]{0} all-gather-done(%s)
  ROOT %o = (f32[4]{0}, f32[2]{0}) all-reduce(%p, %q), to_apply=%add
}
"""  # noqa: E501


def test_collectives_count_loops_and_started_ones():
  assert hlo.collectives(_HLO) == {
    'all-gather': {'count': 18, 'bytes': 17 * 128 + 128},
    'all-reduce': {'count': 1, 'bytes': 24},
  }


def test_flops_of_known_models():
  # 4.4, 17.5 and 81 billion multiply-adds, as published for 224 pixels.
  for variant, giga, dim in (
    ('B/32', 4.4, 512),
    ('B/16', 17.5, 512),
    ('L/14', 81, 768),
  ):
    config = presets.make('laion400m', variant=variant, embedding_dim=dim)
    found = flops.encoder_flops(config.model) / 2e9
    assert found == pytest.approx(giga, rel=0.02)


def test_flops_of_a_resnet():
  config = config_lib.default().model
  config.update(variant='resnet50', pooling='average', image_size=224)
  config.embedding_dim = 1_000  # torchvision's head; its table has 4.09.
  found = flops.encoder_flops(config) / 2e9
  assert found == pytest.approx(4.09, abs=0.005)


def test_classifier_is_a_small_part_of_the_step():
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  parts = flops.train_flops(config, 1_000_000)
  assert parts['classifier'] < 0.05 * sum(parts.values())


def test_only_embedders_of_a_known_architecture_are_planned():
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  config.embed.dtype, config.embed.image_size = 'float32', 280
  found = presets.embedder(config)
  assert (found.variant, found.dtype, found.image_size) == (
    'L/14',
    'float32',
    280,
  )
  config.embed.path = 'some/folder'
  assert presets.embedder(config) is None


def test_chips_by_name():
  assert chips.find('TPU v5 lite').flops == 197e12
  assert chips.find('TPU v5').flops == 459e12
  assert chips.find('cpu') is None
  assert chips.find('TPU7x', devices_per_chip=2).memory == 96 * 2**30


def test_views_are_embedded_and_clustered_too(monkeypatch):
  monkeypatch.setattr(plan, '_chip', lambda _: chips.find('TPU v5 lite'))
  sizes = {'fits': True, 'bytes_per_chip': 0, 'bytes_moved': 0}
  monkeypatch.setattr(hlo, 'compile_sizes', lambda *_: dict(sizes))
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  config.embed.batch_size = 1
  config.cluster.num_centers = 800
  devices = jax.devices()

  def planned(views, fit_on):
    config.embed.views, config.cluster.fit_on = views, fit_on
    return (
      plan._embed(config, devices, 0.5)['embed']['steps'],
      plan._kmeans(config, devices, 0.5)['kmeans']['flops'],
    )

  images = 389_737_314
  flops = 2 * images * 800 * 768 / 8
  assert planned((), 'images') == (-(-images // 8), flops)
  assert planned((2, 3), 'images') == (-(-14 * images // 8), flops)
  assert planned((2, 3), 'views')[1] == 13 * flops


class _Full:
  """A program that the compiler finds no room for."""

  def lower(self, *_):
    return self

  def compile(self):
    raise RuntimeError(
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 20.50G of 15.75G hbm.'
    )


@pytest.mark.parametrize(
  'fields, advice',
  [
    ({}, 'set model.remat=full, which is dots'),
    ({'model.remat': 'full'}, 'raise train.accumulate_steps=1, up to 128'),
    (
      {'model.remat': 'full', 'train.accumulate_steps': 128},
      'raise mesh.fsdp=1, or lower train.batch_size=32768',
    ),
  ],
)
def test_says_what_would_make_it_fit(fields, advice):
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  config.model.remat = 'dots'
  config.update_from_flattened_dict(fields)
  out = hlo.compile_sizes('train', _Full(), ())
  assert not out['fits']
  assert out['bytes_per_chip'] == 20.5 * 2**30
  out['mesh'] = {'data': 256, 'fsdp': 1}
  found = plan._advice(config, out, chips.find('TPU v5 lite'))
  assert found.startswith(advice)


def test_a_state_that_fills_the_memory_is_to_be_split():
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  chip = chips.find('TPU v5 lite')
  found = plan._advice(config, {'arguments': 0.6 * chip.memory}, chip)
  assert found.startswith('raise mesh.fsdp=1')


def test_rules_compare_images_with_centers_more_than_once():
  config = presets.make('laion400m', variant='B/16', embedding_dim=512)
  config.cluster.num_labels, config.embed.views = 10, (2, 3)
  for rule, passes in ('nearest', 1), ('pursuit', 10), ('views', 13):
    config.cluster.rule = rule
    assert plan._label_passes(config) == passes


def _plan(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'mlcd_jax.plan', *flags],
    cwd=_ROOT,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed'
)
def test_says_what_to_install():
  done = _plan('--config=configs/vit_b32.py:laion400m', '--topology=v5e:2x2')
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1].startswith('error: --topology')
  assert 'requirements-tpu.txt' in done.stderr


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='needs libtpu (requirements-tpu.txt)',
)
def test_compiles_a_step_for_a_tpu_slice():
  done = _plan(
    '--config=configs/vit_b32.py:laion400m',
    '--topology=v5e:2x2',
    '--config.train.batch_size=64',
    '--config.cluster.num_centers=20000',
    '--json',
  )
  assert done.returncode == 0, done.stderr
  programs = json.loads(done.stdout)['programs']
  embed = programs['embed']
  assert embed['fits'] and not embed['collectives']
  # 304M weights in float32; 64 images of 162 GFLOPs.
  assert embed['arguments'] == pytest.approx(4 * 304e6, rel=0.02)
  assert embed['flops'] == pytest.approx(64 * 162e9, rel=0.02)
  assert programs['kmeans']['fits'] and programs['kmeans']['label_seconds'] > 0
  train = programs['train']
  assert train['fits']
  # The state, a quarter of the classes each: 88M and 10M parameters.
  state = 4 * 3 * (88e6 + 20_480 * 512 / 4)
  assert train['arguments'] == pytest.approx(state, rel=0.05)
  assert train['collectives']['all-gather']['count'] >= 1
