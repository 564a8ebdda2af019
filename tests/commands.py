"""Starts the command as users do, for tests of whole processes."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent

# As PYTHONPATH: the processes of a run are interleaved in its mesh.
INTERLEAVED = str(ROOT / 'tests/interleaved')

# The quickstart, shrunk to seconds.
TINY = (
  '--config=configs/quickstart.py',
  '--config.data.split=train[:300]',
  '--config.embed.shard_rows=100',
  '--config.cluster.num_centers=64',
  '--config.cluster.iterations=5',
  '--config.model.variant=Nano/14',
  '--config.model.embedding_dim=32',
  '--config.train.steps=12',
  '--config.train.batch_size=32',
  '--config.train.checkpoint_every_steps=4',
  '--config.train.log_every_steps=1',
  '--config.evaluate.batch_size=64',
  '--config.evaluate.datasets.digits.train_split=train[:300]',
  '--config.evaluate.datasets.digits.validation_split=validation[:60]',
  '--config.evaluate.datasets.digits.test_split=test[:100]',
)


def start(*arguments, module='mlcd_jax.main', script='', devices=1, **env):
  """Returns the started module or script's process; its output is text."""
  what = ['-c', script] if script else ['-m', module]
  return subprocess.Popen(
    [sys.executable, *what, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ
    | {
      'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache/jax'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
      'JAX_NUM_CPU_DEVICES': str(devices),
    }
    | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, timeout=300):
  """Returns exit code, stdout and stderr of a process; kills a stuck one."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f'no end after {timeout} s: {err[-3000:]}') from None
  return process.returncode, out, err


def run(*arguments, timeout=300, **options):
  """Returns exit code, stdout and stderr."""
  return finish(start(*arguments, **options), timeout)


def free_port():
  """Returns a port that nobody uses now."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def wait_until(condition, *processes, timeout=240, pause=0.05):
  """Waits for a condition, while all processes run."""
  deadline = time.monotonic() + timeout
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()[1][-3000:]
    assert time.monotonic() < deadline, 'nothing happens'
    time.sleep(pause)


def num_lines(path):
  """Returns how many lines a file has; 0 where there is none."""
  return path.read_text().count('\n') if path.exists() else 0
