"""Values that cannot be used are refused by name."""

import ml_collections
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.config import check as config_check
from mlcd_jax.runtime import errors


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('data.source', 'ftp', 'data.source'),
    ('embed.embedder', 'clip', 'embed.embedder'),
    ('loss.name', 'circle', 'loss.name.*mlcd'),
    ('model.dtype', 'float16', 'model.dtype'),
    ('model.pooling', 'max', 'model.pooling'),
    ('loss.sample_rate', 0.0, 'loss.sample_rate'),
    ('loss.sample_rate', 1.5, 'loss.sample_rate'),
    ('loss.scale', -1.0, 'loss.scale'),
    ('loss.num_positives', 11, 'cluster.num_labels=10'),
    ('loss.name', 'softmax', 'loss.num_positives=1'),
    ('cluster.num_labels', 65, 'cluster.num_centers=64'),
    ('cluster.path', '/nowhere', 'cluster.path=/nowhere'),
    ('train.steps', 0, 'train.epochs'),
    ('train.epochs', 1.0, 'set one of them'),
    ('train.batch_size', 0, 'train.batch_size'),
    ('optimizer.learning_rate', -1.0, 'optimizer.learning_rate'),
    ('embed.views', (2, 0), 'embed.views.*such as'),
    ('embed.views', (2, 2), 'embed.views.*different'),
    ('embed.views', (2.5,), 'embed.views'),
    ('cluster.fit_on', 'views', 'cluster.fit_on=views.*embed.views'),
    ('cluster.rule', 'views', 'cluster.rule=views.*embed.views'),
    ('cluster.rule', 'farthest', 'cluster.rule.*nearest'),
    ('data.crop_area', (0.0, 1.0), 'data.crop_area'),
    ('data.crop_area', (0.9, 0.5), 'data.crop_area'),
    ('data.crop_area', (1,), 'data.crop_area'),
    ('data.crop_area', ('a', 'b'), 'data.crop_area'),
    ('optimizer.learning_rate', float('inf'), 'optimizer.learning_rate'),
    ('optimizer.warmup_steps', float('nan'), 'optimizer.warmup_steps'),
    ('optimizer.b1', 1.0, 'optimizer.b1'),
    ('train.steps', 10**23, 'train.steps'),
    ('train.epochs', float('inf'), 'train.epochs'),
    ('mesh.fsdp', 0, 'mesh.fsdp'),
    ('embed.views', (100,), 'grids from 1 to 16'),
    ('embed.views', (True,), 'grids from 1 to 16'),
    ('embed.views', ('2',), 'grids from 1 to 16'),
    ('evaluate.tasks', ('linear', 'svm'), 'svm'),
    ('evaluate.baselines', ('raw', 'mean'), 'mean'),
    ('seed', -1, 'seed'),
  ],
)
def test_refused(tiny_config, field, value, says):
  config_check.check(tiny_config)
  section, _, name = field.rpartition('.')
  setattr(tiny_config[section] if section else tiny_config, name, value)
  with pytest.raises(errors.UserError, match=says):
    config_check.check(tiny_config)


def test_views_need_an_embedder_that_sees_images(tiny_config, tmp_path):
  tiny_config.embed.views = [3, 1]
  tiny_config.cluster.fit_on = tiny_config.cluster.rule = 'views'
  config_check.check(tiny_config)
  tiny_config.embed.embedder = 'precomputed'
  tiny_config.embed.path = str(tmp_path)
  with pytest.raises(errors.UserError, match='embed.views.*precomputed'):
    config_check.check(tiny_config)
  # The clusters of another run have what they need.
  tiny_config.embed.views = ()
  tiny_config.cluster.path = str(tmp_path)
  config_check.check(tiny_config)


@pytest.mark.parametrize('section', ['data', 'evaluate.datasets.digits'])
@pytest.mark.parametrize(
  ('source', 'key'),
  [
    ('folder', 'attributes_key'),
    ('webdataset', 'attributes_key'),
    ('folder', 'boxes_key'),
    ('coco', 'boxes_key'),
  ],
)
def test_keys_of_objects_need_a_source_that_has_them(
  tiny_config, section, source, key
):
  data = tiny_config
  for part in section.split('.'):
    data = data[part]
  data.attributes_key = ''
  data.source = source
  config_check.check(tiny_config)
  data[key] = 'objects/x'
  with pytest.raises(errors.UserError) as e:
    config_check.check(tiny_config)
  assert str(e.value).startswith(
    f'{section}.{key}=objects/x: {section}.source={source} has none; '
  )
  data.source = 'embedded'
  config_check.check(tiny_config)


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('variant', 'XXL/16', 'model.variant'),
    ('variant', 'B', 'model.variant'),
    ('variant', 'B/0', 'model.variant'),
    ('image_size', 30, 'model.image_size=30'),
  ],
)
def test_model_refused(tiny_config, field, value, says):
  tiny_config.model[field] = value
  with pytest.raises(errors.UserError, match=says):
    models.make(tiny_config.model)


def test_unknown_data_field_is_refused(tiny_config):
  with pytest.raises(ValueError, match='unknown data fields'):
    config_lib.add_dataset(tiny_config, 'x', folder='y')


def test_malformed_configs_are_refused(tiny_config):
  del tiny_config.loss.scale
  with pytest.raises(errors.UserError, match='loss.scale is missing'):
    config_check.check(tiny_config)
  with pytest.raises(errors.UserError, match='is missing; begin a config'):
    config_check.check(ml_collections.ConfigDict())
  other = config_lib.default()
  other.data = ml_collections.ConfigDict(dict(other.data, crop_area='all'))
  with pytest.raises(errors.UserError, match="data.crop_area='all'"):
    config_check.check(other)
  other = config_lib.default()
  with other.evaluate.ignore_type():
    other.evaluate.datasets = 'mine'
  with pytest.raises(errors.UserError, match="evaluate.datasets='mine': needs"):
    config_check.check(other)


def numeric_fields():
  config = config_lib.default()
  sections = {'': {'seed': config.seed}} | {
    name: config[name] for name in config if name != 'seed'
  }
  return [
    f'{section}.{name}'.lstrip('.')
    for section, fields in sections.items()
    for name, value in fields.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  ]


@pytest.mark.parametrize('field', numeric_fields())
def test_every_number_has_a_range(tiny_config, field):
  value = config_lib.default()
  for part in field.split('.'):
    value = value[part]
  tiny_config.update_from_flattened_dict({field: type(value)(-(10**9))})
  with pytest.raises(errors.UserError, match=field):
    config_check.check(tiny_config)
  if isinstance(value, float):
    tiny_config.update_from_flattened_dict({field: float('nan')})
    with pytest.raises(errors.UserError, match=field):
      config_check.check(tiny_config)
