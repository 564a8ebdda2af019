"""The launchers: restarts, dry runs, settings, and files that fit schemas."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from kubeflow_trainer_api import models
import pydantic
import pytest
import yaml

from tests import commands

_LAUNCH = commands.ROOT / 'launch'
_SCRIPTS = sorted([*_LAUNCH.glob('*.sh'), *_LAUNCH.glob('*.sbatch')])


def restart(tmp_path, script, **options):
  """Runs a shell script of that text under restart.sh."""
  (tmp_path / 'run/checkpoints').mkdir(parents=True)
  return subprocess.Popen(
    [
      _LAUNCH / 'restart.sh', 'bash', '-c', script, 'run',
      f'--workdir={tmp_path}/run',
    ],
    env=os.environ
    | {'RESTART_DELAY': '0', 'RESTART_LIMIT': '3', 'W': str(tmp_path)},
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )  # fmt: skip


_COUNT = 'echo >> $W/count; n=$(wc -l < $W/count); '


@pytest.mark.parametrize(
  ('script', 'code', 'starts'),
  [
    ('exit 0', 0, 1),
    ('exit 1', 1, 1),
    ('exit 2', 2, 1),
    ('exit 75', 75, 3),
    ('exit 3', 3, 3),
    ('[ $n -gt 5 ] && exit 0; mkdir $W/run/checkpoints/$n; exit 75', 0, 6),
    # What is half written is no progress.
    ('mkdir $W/run/checkpoints/$n.orbax-checkpoint-tmp; exit 75', 75, 3),
    ('[ $n -lt 4 ] && mkdir $W/run/checkpoints/$n; exit 75', 75, 6),
  ],
)
def test_restarts(tmp_path, script, code, starts):
  process = restart(tmp_path, _COUNT + script)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code, err
  assert commands.num_lines(tmp_path / 'count') == starts
  assert ('without progress' in err) == (code in (3, 75))


@pytest.mark.parametrize(
  ('arguments', 'folder'),
  [
    (['--config=configs/vit_b16.py'], 'vit_b16'),
    (['--config', './my recipe.py:laion400m'], 'my_recipe_laion400m'),
    (['--config=a.py:x,y/z', '--config.train.steps=3'], 'a_x_y_z'),
    (['--config=a.py', '--workdir', 'runs/b'], 'b'),
  ],
)
def test_restarts_look_where_the_run_writes(tmp_path, arguments, folder):
  done = subprocess.run(
    [_LAUNCH / 'restart.sh', 'bash', '-c', 'exit 3', 'run', *arguments],
    cwd=tmp_path,
    env=os.environ | {'RESTART_LIMIT': '1'},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 3
  assert done.stderr.endswith(f' without progress in runs/{folder}\n')


def test_a_signal_reaches_the_command_and_ends_it(tmp_path):
  script = (
    _COUNT + "trap 'sleep 1; touch $W/saved; exit 75' TERM; touch $W/up; "
    'while true; do sleep 0.1; done'
  )
  process = restart(tmp_path, script)
  commands.wait_until((tmp_path / 'up').exists, process)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert (tmp_path / 'saved').exists()
  time.sleep(0.5)
  assert commands.num_lines(tmp_path / 'count') == 1


def test_tpu_vm_dry_run():
  done = subprocess.run(
    [_LAUNCH / 'tpu_vm.sh', '--config=c.py', '--workdir=/a b'],
    env=os.environ
    | {
      'DRY_RUN': '1', 'SPOT': '1', 'NAME': 'n', 'ZONE': 'z',
      'TYPE': 'v5litepod-16', 'REPO': 'r',
    },
    capture_output=True,
    text=True,
    timeout=60,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  create, install, run = done.stdout.splitlines()
  assert 'queued-resources create n --node-id=n' in create
  assert create.rstrip().endswith('--spot')
  assert 'requirements-tpu.txt' in install and '--worker=all' in install
  assert 'mlcd_jax.main' in run and '--config=c.py' in run


def test_multi_gpu_dry_run():
  nodes = {'NUM_NODES': '2', 'NODE_RANK': '1', 'COORDINATOR': 'n:1'}
  for env, rest in (
    ({}, ''),
    (nodes, '--coordinator_address=n:1 --num_processes=2 --process_id=1 '),
  ):
    done = subprocess.run(
      [_LAUNCH / 'multi_gpu.sh', '--config=c.py', '--workdir=/a b'],
      env=os.environ | env | {'DRY_RUN': '1'},
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, _, arguments = done.stdout.partition(' -m mlcd_jax.main ')
    assert arguments == f'--config=c.py --workdir=/a\\ b {rest}\n'


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_xla_knows_every_flag_of_the_environment(platform):
  script = (
    f'. launch/environment.sh {platform}; env; exec {sys.executable} -c '
    '"import jax; print(jax.config.jax_compilation_cache_dir, '
    'jax.devices()[0].platform)"'
  )
  done = subprocess.run(
    ['bash', '-euc', script],
    cwd=commands.ROOT,
    env={'HOME': '/home/me', 'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr  # XLA aborts at an unknown flag.
  *env, end = done.stdout.splitlines()
  assert end == '/home/me/.cache/mlcd_jax/jax cpu'
  assert any('latency_hiding' in line for line in env) == (platform == 'gpu')


def test_the_environment_leaves_what_is_set():
  given = {
    'PATH': '/usr/bin:/bin',
    'XLA_FLAGS': '--mine',
    'JAX_COMPILATION_CACHE_DIR': '/mine',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5',
  }
  script = f'set -u; . {_LAUNCH}/environment.sh gpu; env'
  env = subprocess.run(
    ['bash', '-euc', script], env=given, capture_output=True, text=True
  ).stdout.splitlines()
  assert 'JAX_COMPILATION_CACHE_DIR=/mine' in env
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION=0.5' in env
  (flags,) = (line for line in env if line.startswith('XLA_FLAGS='))
  assert flags.endswith(' --mine')


@pytest.mark.parametrize('path', _SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck(path):
  subprocess.run(
    [pathlib.Path(sys.executable).with_name('shellcheck'), '-x', path],
    cwd=commands.ROOT,
    check=True,
  )


def jobset(text):
  """Whether all is as JobSet's and Kubernetes' schemas have it."""
  content = yaml.safe_load(text)
  # What a schema does not know is dropped.
  return models.JobsetV1alpha2JobSet.from_dict(content).to_dict() == content


def test_jobset_fits_its_schema():
  text = (_LAUNCH / 'gke_jobset.yaml').read_text()
  assert jobset(text)
  for right, wrong in (
    ('maxRestarts:', 'maxRestart:'),
    ('backoffLimit:', 'backoffLimits:'),
    ('claimName:', 'name:'),
    ('maxRestarts: 20', 'maxRestarts: many'),
    ('restartPolicy: Never', 'restartPolicy: [Never]'),
  ):
    assert right in text
    try:
      assert not jobset(text.replace(right, wrong)), wrong
    except pydantic.ValidationError:
      pass
  (job,) = yaml.safe_load(text)['spec']['replicatedJobs']
  job = job['template']['spec']
  assert job['parallelism'] == job['completions'] == 16 * 16 // 4


_SKYPILOT = """
import sys, yaml
import sky
from sky.utils import common_utils, schemas
text = open('launch/skypilot.yaml').read()
for wrong in sys.argv[1:]:
  right, _, wrong = wrong.partition('->')
  assert right in text
  text = text.replace(right, wrong)
common_utils.validate_schema(yaml.safe_load(text), schemas.get_task_schema())
sky.Task.from_yaml_config(yaml.safe_load(text))
"""


@pytest.mark.slow
def test_skypilot_takes_the_task(tmp_path):
  subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
  python = tmp_path / 'venv/bin/python'
  installed = subprocess.run(
    [python, '-m', 'pip', 'install', '--quiet', 'skypilot==0.14.1'],
    capture_output=True,
    text=True,
    timeout=300,
  )
  if installed.returncode:
    pytest.skip(f'pip install skypilot: {installed.stderr.strip()[-300:]}')
  for change, taken in (
    ([], True),
    (['use_spot:->use_spots:'], False),
    (['num_nodes: 1->num_nodes: one'], False),
  ):
    done = subprocess.run(
      [python, '-c', _SKYPILOT, *change],
      cwd=commands.ROOT,
      env=os.environ
      | {'HOME': str(tmp_path), 'SKYPILOT_DISABLE_USAGE_COLLECTION': '1'},
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert (done.returncode == 0) == taken, done.stderr


def test_what_was_not_run_says_so():
  for name in ('gke_jobset.yaml', 'skypilot.yaml', 'slurm.sbatch', 'tpu_vm.sh'):
    head = ''.join((_LAUNCH / name).read_text().splitlines()[:4])
    assert 'Not run' in head or 'not on GPUs' in head, name
  assert 'launch/restart.sh' in (_LAUNCH / 'skypilot.yaml').read_text()
