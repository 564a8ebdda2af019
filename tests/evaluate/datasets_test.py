"""The paper's data sets by name."""

import logging

from PIL import Image
import pytest

from mlcd_jax.config import check as config_check
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import stage
from mlcd_jax.runtime import errors


def test_the_paper_has_27(tiny_config):
  assert len(datasets.NAMED) == 27
  tiny_config.evaluate.named = ('paper',)
  config = datasets.with_named(tiny_config)
  assert len(config.evaluate.datasets) == 28
  config_check.check(config)
  metrics = {n: d.metric for n, d in config.evaluate.datasets.items()}
  assert {n for n, m in metrics.items() if m == 'mean_per_class'} == {
    'aircraft', 'pets', 'caltech101', 'flowers',
  }  # fmt: skip
  assert metrics['voc2007'] == 'map_11_point'
  assert metrics['hateful_memes'] == 'roc_auc'
  assert metrics['kinetics700'] == 'mean_top1_top5'
  # MLCD's Table 11.
  sizes = {n: (d.train, d.test) for n, d in datasets.NAMED.items()}
  assert sizes['resisc45'] == (3_150, 25_200)
  assert sizes['country211'] == (42_200, 21_100)


def test_unknown_name(tiny_config):
  tiny_config.evaluate.named = ('food101,petz',)
  with pytest.raises(errors.UserError, match="evaluate.named: 'petz'.*pets"):
    datasets.with_named(tiny_config)


def test_by_hand_says_from_where(tiny_config, tmp_path):
  tiny_config.evaluate.named = ('aircraft',)
  tiny_config.evaluate.data_dir = str(tmp_path)
  config = datasets.with_named(tiny_config)
  with pytest.raises(
    errors.UserError, match=f'datasets.aircraft.*by hand.*{tmp_path}/aircraft'
  ):
    stage.open_sources(config)


def test_other_sizes_are_told(tiny_config, tmp_path, caplog, monkeypatch):
  for split, count in (('train', 3), ('test', 2)):
    for i in range(count):
      path = tmp_path / 'aircraft' / split / 'ab'[i % 2] / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (8, 8)).save(path)
  tiny_config.evaluate.named = ('aircraft',)
  tiny_config.evaluate.data_dir = str(tmp_path)
  monkeypatch.setattr(logging.getLogger('mlcd_jax'), 'propagate', True)
  opened = stage.open_sources(datasets.with_named(tiny_config))
  assert len(opened['aircraft']['train']) == 3
  assert '3 training and 2 test images' in caplog.text
  assert '6667 and 3333' in caplog.text
