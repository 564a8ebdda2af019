"""Fine-tuning: learns, and the lower layers less."""

import jax
import numpy as np
import pytest

from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate.tasks import finetune
from tests.evaluate import blobs


def test_layers_decay():
  block = {'kernel': 0}
  params = {
    'encoder': {
      'patches': block, 'positions': 0, 'class_token': 0, 'stem_conv': 0,
      'block_00': block,
      'block_01': block, 'post_norm': block,
    },
    'head': block,
  }  # fmt: skip
  found = finetune.layer_scales(params, 2, 0.5)
  assert found['head']['kernel'] == found['encoder']['post_norm']['kernel'] == 1
  assert found['encoder']['block_01']['kernel'] == 0.5
  assert found['encoder']['block_00']['kernel'] == 0.25
  for name in ('positions', 'class_token', 'stem_conv'):
    assert found['encoder'][name] == 0.125


@pytest.mark.slow
def test_learns_more_than_the_head_alone(tiny_config):
  tiny_config.evaluate.finetune_epochs = 45.0
  tiny_config.evaluate.finetune_learning_rate = 3e-3
  tiny_config.evaluate.finetune_batch_size = 64
  model = models.make(tiny_config.model)
  images = np.zeros((1, 28, 28, 3), np.uint8)
  params = model.init(jax.random.key(0), images)['params']
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  encoder = encoders.from_model(model, params, mesh)
  extract = features.Extractor(encoder, 'x', 64)
  dataset = tiny_config.evaluate.datasets.digits
  train, test = (
    extract(sources.make(dataset, split), split)
    for split in ('train[:300]', 'test[:500]')
  )
  data = features.Data(train, test, 10, mesh, encoder, extract, config=dataset)
  accuracy = {}
  for decay in (0.0, 1.0):
    tiny_config.evaluate.finetune_layer_decay = decay
    accuracy[decay] = finetune.run(data, tiny_config)['accuracy']
  assert accuracy[1.0] > max(0.5, accuracy[0.0] + 0.1), accuracy


def test_features_without_a_model_are_not_tuned(tiny_config):
  rows = blobs.draw(20)
  assert finetune.run(blobs.data(rows, rows), tiny_config) == {}
