"""launch/slurm.sbatch on a Slurm of one node: killed, stopped, put in again."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests import commands

pytestmark = [pytest.mark.slow, pytest.mark.alone]

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=128
PartitionName=test Nodes=ALL Default=YES
"""


def _install():
  """Installs Debian's Slurm where it is missing, or skips."""
  if shutil.which('slurmctld') and shutil.which('munged'):
    return
  if os.geteuid() or not shutil.which('apt-get'):
    pytest.skip('no slurmctld and munged; installing them needs root and apt')
  for arguments in (
    ['update'],
    ['install', '--yes', '--no-install-recommends', 'slurm-wlm', 'munge'],
  ):
    done = subprocess.run(
      ['apt-get', '-o', 'DPkg::Lock::Timeout=120', *arguments],
      env=os.environ | {'DEBIAN_FRONTEND': 'noninteractive'},
      capture_output=True,
      text=True,
      timeout=300,
    )
    if done.returncode:
      pytest.skip(f'apt-get {arguments[0]}: {done.stderr.strip()[-300:]}')


@pytest.fixture(scope='module', name='slurm')
def fixture_slurm(tmp_path_factory):
  """(command, ...) -> its output, on a cluster that is this machine."""
  _install()
  folder = tmp_path_factory.mktemp('slurm')
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  key = folder / 'munge.key'
  key.write_bytes(os.urandom(128))
  key.chmod(0o400)
  config = folder / 'slurm.conf'
  user = pathlib.Path('/proc/self').owner()
  config.write_text(
    _CONFIG.format(
      folder=folder,
      host=socket.gethostname().partition('.')[0],
      user=user,
      port=commands.free_port(),
      node_port=commands.free_port(),
    )
  )
  env = os.environ | {
    'SLURM_CONF': str(config),
    'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
    'JAX_COMPILATION_CACHE_DIR': str(commands.ROOT / '.cache/jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    'JAX_NUM_CPU_DEVICES': '2',
    'PYTHONPATH': commands.INTERLEAVED,
  }

  def run(*command):
    return subprocess.run(
      command,
      cwd=commands.ROOT,
      env=env,
      check=True,
      capture_output=True,
      text=True,
      timeout=60,
    ).stdout

  daemons = []
  try:
    for command in (
      [
        'munged', '--foreground', '--force', f'--key-file={key}',
        *(f'--{name}={folder}/munge.{name.partition("-")[0]}'
          for name in ('socket', 'pid-file', 'log-file', 'seed-file')),
      ],
      ['slurmctld', '-D'],
      ['slurmd', '-D'],
    ):  # fmt: skip
      with open(folder / f'{command[0]}.out', 'w') as log:
        daemons.append(
          subprocess.Popen(command, env=env, stdout=log, stderr=log)
        )
    ready = ['sinfo', '--noheader', '--format=%T']
    commands.wait_until(
      lambda: (
        subprocess.run(ready, env=env, capture_output=True).stdout == b'idle\n'
      ),
      timeout=60,
      pause=0.5,
    )
    yield run
  finally:
    # What runs outlives the daemons.
    subprocess.run(['scancel', '--user', user], env=env)
    commands.wait_until(
      lambda: not subprocess.check_output(['squeue', '--noheader'], env=env),
      timeout=60,
      pause=0.5,
    )
    for daemon in reversed(daemons):
      daemon.terminate()
      daemon.wait(timeout=30)


def test_killed_and_stopped_tasks_run_again(slurm, tmp_path):
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  steps = 120
  job = slurm(
    'sbatch', '--parsable', f'--output={log}',
    # One node that has neither GPUs nor two minutes to wait.
    '--ntasks-per-node=2', '--gpus-per-node=0',
    'launch/slurm.sbatch', *commands.TINY, f'--workdir={workdir}',
    f'--config.train.steps={steps}', '--config.train.checkpoint_every_steps=10',
    "--config.evaluate.tasks=('knn',)", '--heartbeat_timeout=8',
  ).strip()  # fmt: skip
  metrics = workdir / 'metrics.jsonl'

  def said(text):
    return lambda: log.exists() and text in log.read_text()

  def task(index):
    for line in slurm('scontrol', 'listpids', f'{job}.0').splitlines()[1:]:
      pid, _, _, local, _ = line.split()
      if local == str(index):
        return int(pid)
    raise AssertionError(f'no task {index}')

  def state():
    shown = slurm('scontrol', 'show', 'job', job)
    assert 'JobState=FAILED' not in shown, log.read_text()[-3000:]
    return shown

  def starts_again(times):
    commands.wait_until(lambda: f'Restarts={times}' in state(), pause=0.5)
    # Not two minutes, as is Slurm's way, but until it has forgotten the last.
    slurm('scontrol', 'update', f'JobId={job}', 'StartTime=now+10seconds')

  commands.wait_until(lambda: commands.num_lines(metrics) > 20)
  os.kill(task(1), signal.SIGKILL)
  commands.wait_until(said('error: process 1: lost'))
  starts_again(1)
  commands.wait_until(said('train: continuing from step'))
  before = commands.num_lines(metrics)
  commands.wait_until(lambda: commands.num_lines(metrics) > before + 20)
  slurm('scancel', '--signal=TERM', job)
  commands.wait_until(said('after saving; run the same command'))
  starts_again(2)
  commands.wait_until(lambda: 'JobState=COMPLETED' in state(), pause=1)
  assert 'Restarts=2' in state()
  lines = map(json.loads, metrics.read_text().splitlines())
  assert [r['step'] for r in lines] == list(range(1, steps + 1))
  assert (workdir / 'results.json').exists()
