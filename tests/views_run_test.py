"""A whole tiny run whose centers and labels are of the scenes' views."""

import json
import logging

import numpy as np
import pytest

from mlcd_jax import stages
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors


@pytest.fixture(name='config')
def fixture_config(tiny_config):
  config = tiny_config
  config.data.path = 'scenes'
  config.data.split = 'train[:60]'
  config.embed.views = (2, 3)
  config.embed.shard_rows = 25
  config.cluster.update(
    dict(num_centers=12, fit_on='views', rule='views', num_labels=10)
  )
  config.loss.num_positives = 10
  config.train.steps = 3
  config.train.max_skipped_steps = 0
  return config


def test_a_run_on_views(config, tmp_path, caplog):
  workdir = tmp_path / 'run'
  with caplog.at_level(logging.WARNING):
    stages.run(config, workdir, ('embed', 'cluster', 'train'))
  assert 'report.html' not in caplog.text  # No part of the page is missing.
  views = shards.Embeddings(workdir / 'views', 3)
  assert views.shape == (60 * 13, 324)
  report = json.loads((workdir / 'clusters/clustering.json').read_text())
  assert report['num_points'] == 60 * 13
  labels = np.concatenate(
    [np.load(path) for path in sorted((workdir / 'clusters').glob('labels*'))]
  )
  centers = np.load(workdir / 'clusters/centers.npy')
  nearest = (views[:].astype(np.float32) @ centers.T).argmax(1).reshape(60, 13)
  for row, expected in zip(labels, nearest):
    assert set(row) - {-1} <= set(expected)
    assert (row >= 0).sum() == min(10, len(set(expected)))
  assert (labels == -1).any() and (labels[:, 0] >= 0).all()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  assert [line['step'] for line in metrics] == [1, 2, 3]
  assert all(np.isfinite(line['train/loss']) for line in metrics)
  assert all(line['train/images_without_labels'] == 0 for line in metrics)
  page = json.loads((workdir / 'report/browsers.json').read_text())['browsers']
  assert page['rule'] == 'views'
  assert '-1' not in page['cards']
  assert {len(i['clusters']) for i in page['images']} & set(range(8))
  for image in page['images']:
    assert min(image['clusters']) >= 0
    assert len(image['clusters']) == len(image['cosines'])

  # Another run may use the clusters without having views of its own.
  config.cluster.path = str(workdir)
  config.embed.views = ()
  stages.run(config, tmp_path / 'other', ('embed', 'cluster'))
  assert not (tmp_path / 'other/clusters').exists()
  # Other views are other embeddings.
  config.cluster.path = ''
  config.embed.views = (2,)
  with pytest.raises(errors.UserError, match='embed.views'):
    stages.run(config, workdir, ('embed', 'cluster'))
