"""Signals: the first is noted, the second ends at once."""

import signal
import subprocess
import sys

import pytest

from tests import commands

_NOTED = """
import os, signal
from mlcd_jax.runtime import signals
with signals.noted() as noted:
  assert not noted()
  os.kill(os.getpid(), signal.{first})
  assert noted()
  print('noted', flush=True)
  os.kill(os.getpid(), signal.{second})
print('still here')
"""


@pytest.mark.parametrize(
  ('first', 'second'),
  [('SIGTERM', 'SIGTERM'), ('SIGINT', 'SIGTERM'), ('SIGTERM', 'SIGINT')],
)
def test_the_second_signal_ends_at_once(first, second):
  done = subprocess.run(
    [sys.executable, '-c', _NOTED.format(first=first, second=second)],
    cwd=commands.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == -getattr(signal, second), done.stderr
  assert done.stdout == 'noted\n'


_SLOW_TO_SAVE = """
import pathlib, sys, time
from mlcd_jax import main
from mlcd_jax.runtime import cli
from mlcd_jax.weights import checkpoint
def save(*arguments):
  pathlib.Path(sys.argv[-1].partition('=')[2], 'saving').touch()
  time.sleep(600)
checkpoint.Checkpointer.save = save
cli.run(main.main, required=('config', 'workdir'))
"""


@pytest.mark.slow
def test_the_second_signal_ends_a_run_that_is_saving(tmp_path):
  arguments = (
    *commands.TINY, '--stages=embed,cluster,train',
    '--config.train.steps=100000', f'--workdir={tmp_path}',
  )  # fmt: skip
  process = commands.start(
    *arguments[:-1],
    '--config.train.checkpoint_every_steps=100000',
    arguments[-1],
    script=_SLOW_TO_SAVE,
  )
  metrics = tmp_path / 'metrics.jsonl'
  commands.wait_until(lambda: commands.num_lines(metrics) > 4, process)
  process.send_signal(signal.SIGTERM)
  commands.wait_until((tmp_path / 'saving').exists, process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == -signal.SIGTERM
  process.communicate()
  more = '--config.train.stop_after_steps=3'
  code, _, err = commands.run(*arguments, more)
  assert code == 0, err
