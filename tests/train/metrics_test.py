"""What is written, and what a continued run writes again."""

import importlib.util
import json
import sys
import types

import pytest

from mlcd_jax.config import check as config_check
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import progress
from mlcd_jax.train import metrics


def steps(path):
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_continued_run_drops_what_it_writes_again(tmp_path):
  writer = metrics.Writer(tmp_path, first_step=1)
  for step in range(1, 6):
    writer.write(step, {'train/loss': float(step)})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 6, "tra')  # Killed in a line.

  writer = metrics.Writer(tmp_path, first_step=4)
  writer.write(4, {'train/loss': 40.0})
  writer.close()
  assert steps(path) == [1, 2, 3, 4]
  last = json.loads(path.read_text().splitlines()[-1])
  assert last == {'step': 4, 'train/loss': 40.0}
  assert list((tmp_path / 'tensorboard').iterdir())


@pytest.mark.parametrize(
  'broken',
  [b'caf\xe9 \xff', b'{"step": 1, "a": "\xe9"}', b'\0\0', b'[1]', b'3'],
)
def test_broken_lines_are_dropped(tmp_path, broken):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 2}\n{"step": 3}\n')
  metrics.Writer(tmp_path, first_step=3).close()
  assert steps(path) == [1, 2]


def test_speed():
  def speed(**fields):
    return progress.Progress('x', 9, unit='points', **fields)._speed(1_000.0)

  assert speed() == ''
  assert speed(flops=2e9) == ' 2 TFLOP/s'
  assert speed(flops=2e9, peak_flops=1e13) == ' 2 TFLOP/s (20% of peak)'


class Wandb(types.ModuleType):
  """Stands for Weights & Biases: keeps runs by id, and what they log."""

  Error = type('Error', (Exception,), {})

  def __init__(self):
    super().__init__('wandb')
    self.begun, self.logged, self.finished, self.refuses = [], {}, 0, ''

  def Settings(self, **settings):
    return settings

  def init(self, **arguments):
    if self.refuses:
      raise self.Error(self.refuses)
    self.begun.append(arguments)
    logged = self.logged.setdefault(arguments['id'], {})

    def log(values, step):
      logged.setdefault(step, {}).update(values)

    def finish():
      self.finished += 1

    return types.SimpleNamespace(
      step=max(logged, default=0),
      log=log,
      finish=finish,
      offline=False,
      url='x',
    )


@pytest.fixture(name='wandb')
def fixture_wandb(monkeypatch, tiny_config):
  wandb = Wandb()
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  tiny_config.train.wandb_project = 'digits'
  return wandb


def test_a_continued_run_is_the_same_at_wandb(wandb, tiny_config, tmp_path):
  for first_step in (1, 3):
    writer = metrics.Writer(tmp_path, first_step=first_step, config=tiny_config)
    for step in range(first_step, first_step + 4):
      writer.write(step, {'train/loss': first_step + step / 10})
      writer.write(step, {'evaluate/x': 1.0})
    writer.close()
  assert [run['id'] for run in wandb.begun] == 2 * [
    (tmp_path / 'wandb_id.txt').read_text()
  ]
  assert wandb.begun[0]['project'] == 'digits'
  assert wandb.begun[0]['config']['train']['batch_size'] == 32
  assert wandb.finished == 2
  # What it had before is not sent again.
  ((_, logged),) = wandb.logged.items()
  assert logged[3] == {'train/loss': 1.3, 'evaluate/x': 1.0}
  assert logged[6] == {'train/loss': 3.6, 'evaluate/x': 1.0}
  assert list(logged) == list(range(1, 7))


def test_only_the_first_process_logs_to_wandb(
  wandb, tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics.distributed, 'is_main', lambda: False)
  writer = metrics.Writer(tmp_path, first_step=1, config=tiny_config)
  writer.write(1, {'train/loss': 1.0})
  writer.close()
  assert not wandb.begun and not list(tmp_path.iterdir())


def test_wandb_that_cannot_be_used_is_said(wandb, tiny_config, tmp_path):
  wandb.refuses = 'api_key not configured'
  with pytest.raises(errors.UserError, match='api_key.*WANDB_MODE=offline'):
    metrics.Writer(tmp_path, first_step=1, config=tiny_config)


def test_wandb_that_is_not_there_is_said(wandb, tiny_config, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.UserError, match='project=digits.*pip install'):
    config_check.check(tiny_config)
