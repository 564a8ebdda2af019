"""Every config builds with every preset."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.config import check as config_check
from mlcd_jax.config import presets
from mlcd_jax.runtime import errors

_CONFIGS = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))
_ARGUMENTS = {
  'quickstart': (None, 'lit'),
  'robustness': (None, 'imagenet_a,objectnet'),
  'scenes': (None,),
}
_CASES = [
  (path, preset)
  for path in _CONFIGS
  for preset in (_ARGUMENTS.get(path.stem, (None, *presets.NAMES)))
]


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ('path', 'preset'), _CASES, ids=[f'{p.stem}-{a}' for p, a in _CASES]
)
def test_builds(path, preset):
  module = load(path)
  assert f'--config=configs/{path.name}' in module.__doc__
  config = module.get_config(preset)
  assert isinstance(config, ml_collections.ConfigDict)
  # A preset adds no field that the default does not have.
  default = config_lib.default()
  for section, fields in config_lib.to_dict(config).items():
    if isinstance(fields, dict) and section != 'evaluate':
      assert set(fields) == set(default[section])
  config_check.check(config)
  assert embedding_shape(config.model.to_json()) == (
    2,
    config.model.embedding_dim,
  )


@functools.cache  # Most presets of a config have the same model.
def embedding_shape(model):
  config = ml_collections.ConfigDict(json.loads(model))
  size = config.image_size
  out = jax.eval_shape(
    lambda images: models.make(config).init_with_output(
      jax.random.key(0), images
    )[0],
    jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8),
  )
  return out['embedding'].shape


def test_paper_recipe():
  config = load(_CONFIGS[0].with_name('vit_l14.py')).get_config('laion400m')
  assert config.cluster.num_centers == 1_000_000
  assert config.loss.num_positives == 8
  assert config.loss.sample_rate == 0.1
  assert config.train.batch_size == 32_768
  assert config.train.epochs == 32


def test_unknown_preset_is_refused():
  with pytest.raises(errors.UserError, match='laion400m'):
    presets.make('laion', variant='B/16', embedding_dim=8)


def test_shifted_imagenets():
  make = load(_CONFIGS[0].with_name('robustness.py')).get_config
  sets = make().evaluate.datasets
  assert set(sets) == set(presets.ROBUSTNESS)
  assert [n for n, d in sets.items() if d.present_classes] == [
    'imagenet_a',
    'imagenet_r',
  ]
  assert (sets.imagenet.test_split, sets.objectnet.source) == (
    'validation',
    'folder',
  )
  assert set(make('imagenet_r').evaluate.datasets) == {'imagenet_r'}
  with pytest.raises(errors.UserError, match="'imagenet_x' is unknown"):
    make('imagenet_x')


@pytest.mark.parametrize('preset', ['digits', 'scenes'])
def test_embedded_data_have_validation_splits(preset):
  config = config_lib.default()
  getattr(presets, preset)(config)
  config.train.steps = 1
  config_check.check(config)
  (dataset,) = config.evaluate.datasets.values()
  assert [dataset[f'{s}_split'] for s in ('train', 'validation', 'test')] == [
    'train', 'validation', 'test'
  ]  # fmt: skip
