"""The launchers: restarts, dry runs, and files that parse."""

import os
import shutil
import signal
import subprocess
import time

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


@pytest.mark.parametrize('path', _SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
  subprocess.run(['bash', '-n', path], check=True)
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', path], check=True)


def test_yaml_parses_and_says_that_it_was_not_run():
  gke = yaml.safe_load((_LAUNCH / 'gke_jobset.yaml').read_text())
  (job,) = gke['spec']['replicatedJobs']
  job = job['template']['spec']
  assert job['parallelism'] == job['completions'] == 16 * 16 // 4
  sky = yaml.safe_load((_LAUNCH / 'skypilot.yaml').read_text())
  assert 'launch/restart.sh' in sky['run']
  for name in ('gke_jobset.yaml', 'skypilot.yaml', 'slurm.sbatch', 'tpu_vm.sh'):
    head = ''.join((_LAUNCH / name).read_text().splitlines()[:4])
    assert 'Not run' in head, name
