"""SIGKILL at random moments of every stage changes nothing in the end."""

import json
import os
import random
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlcd_jax.weights import checkpoint
from tests import commands

pytestmark = pytest.mark.slow

_FOLDERS = ('embeddings', 'clusters', 'checkpoints', 'evaluation')
_ARGUMENTS = (
  *commands.TINY,
  '--config.train.checkpoint_every_steps=1',
  "--config.evaluate.tasks=('knn',)",
)


def start(workdir):
  return commands.start(*_ARGUMENTS, f'--workdir={workdir}')


def finish(workdir):
  code, _, err = commands.finish(start(workdir))
  assert code == 0, err


@pytest.fixture(scope='module', name='whole')
def fixture_whole(tmp_path_factory):
  """The run that is not killed, and how many seconds each stage takes."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  finish(workdir)  # Fills the compilation cache.
  workdir = workdir.with_name('again')
  process = start(workdir)
  began, ended = {}, {}
  while len(ended) < len(_FOLDERS):
    assert process.poll() in (None, 0), process.communicate()[1]
    for folder in _FOLDERS:
      path = workdir / folder / 'manifest.json'
      if not path.exists():
        continue
      began.setdefault(folder, time.monotonic())
      if json.loads(path.read_text())['complete']:
        ended.setdefault(folder, time.monotonic())
    time.sleep(0.005)
  commands.finish(process)
  return workdir, {f: ended[f] - began[f] for f in _FOLDERS}


def outcome(workdir):
  """Everything that must be the same to the bit."""
  found = {
    str(p.relative_to(workdir)): p.read_bytes()
    for p in (*workdir.rglob('*.npy'), workdir / 'results.json')
  }
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found['losses'] = [
    (r['step'], r['train/loss'], r['train/gradient_norm'])
    for r in map(json.loads, lines)
  ]
  folder = workdir / 'checkpoints'
  step = checkpoint.latest_step(folder)
  state = ocp.StandardCheckpointer().restore(folder / str(step) / 'default')
  found['state'] = {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }
  return found


def assert_same(workdir, expected):
  found = outcome(workdir)
  assert found.keys() == expected.keys()
  for name in expected:
    assert found[name] == expected[name], name


def leftovers(workdir):
  return [p for p in workdir.rglob('*') if '.tmp' in p.name or '-tmp' in p.name]


@pytest.mark.parametrize('seed', range(5))
def test_killed_in_every_stage(whole, tmp_path, seed):
  reference, seconds = whole
  rng = random.Random(seed)
  killed_before_the_end = 0
  for folder in _FOLDERS:
    process = start(tmp_path)
    manifest = tmp_path / folder / 'manifest.json'
    commands.wait_until(manifest.exists, process)
    time.sleep(rng.random() * seconds[folder])
    process.kill()
    commands.finish(process)
    killed_before_the_end += not json.loads(manifest.read_text())['complete']
  assert killed_before_the_end >= 2  # The others in what follows the stage.
  finish(tmp_path)
  assert not leftovers(tmp_path)
  assert_same(tmp_path, outcome(reference))


@pytest.mark.parametrize('step', [2, 7])
def test_killed_while_a_checkpoint_is_written(whole, tmp_path, step):
  reference, _ = whole
  process = start(tmp_path)

  folder = tmp_path / 'checkpoints'

  def written():
    return folder.exists() and any(
      name.startswith(f'{step}.orbax-checkpoint-tmp')
      for name in os.listdir(folder)
    )

  commands.wait_until(written, process, pause=0)
  process.kill()
  commands.finish(process)
  finish(tmp_path)
  assert not leftovers(tmp_path)
  assert_same(tmp_path, outcome(reference))
