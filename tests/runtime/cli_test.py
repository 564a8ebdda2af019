"""The command itself: exit codes, one-line errors, signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags
import pytest

from mlcd_jax.runtime import cli
from mlcd_jax.weights import checkpoint

_ROOT = pathlib.Path(__file__).parents[2]
_TINY = (
  '--config=configs/quickstart.py',
  '--config.data.split=train[:300]',
  '--config.cluster.num_centers=64',
  '--config.cluster.iterations=3',
  '--config.model.variant=Nano/14',
  '--config.model.embedding_dim=32',
  '--config.train.batch_size=32',
  '--config.train.log_every_steps=1',
  '--config.train.checkpoint_every_steps=1000',
)


def start(*arguments, module='mlcd_jax.main', cwd=_ROOT):
  return subprocess.Popen(
    [sys.executable, '-m', module, *map(str, arguments)],
    cwd=cwd,
    env=os.environ
    | {
      'JAX_COMPILATION_CACHE_DIR': str(_ROOT / '.cache/jax'),
      'PYTHONPATH': str(_ROOT),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*arguments, **options):
  process = start(*arguments, **options)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ((), '--config is missing; there are configs/'),
    (('--config=configs/vit_b61.py',), 'configs/vit_b16.py'),
    (('--config',), 'no such file'),
    (('--config=configs/vit_b16.py:laion', '--workdir=x'), 'laion400m'),
    ((*_TINY, '--workdir=x', '--config.train.stepz=1'), '"steps" instead'),
    ((*_TINY, '--workdir=x', '--config.train.steps=many'), 'train.steps'),
    ((*_TINY, '--workdir=x', '--config.lr=1'), "no field 'lr'"),
    ((*_TINY, '--workdir=x', '--wrkdir=y'), 'wrkdir'),
    ((*_TINY, '--workdir=x', 'embed'), "'embed' is not a flag"),
  ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, says):
  code, out, err = run(*arguments)
  assert code == 2
  assert err.startswith('error: ') and err.count('\n') == 1
  assert says in err
  assert not out


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ('def get_config(:', 'SyntaxError'),
    ('import no_such_module', 'ModuleNotFoundError'),
    ("def get_config(arg=None): return {}['x']", 'KeyError: x'),
    ('x = 1', 'get_config'),
    ('def get_config(arg=None): return None', '--config'),
    (
      'import ml_collections\n'
      'def get_config(arg=None): return ml_collections.ConfigDict()',
      'is missing; begin a config',
    ),
  ],
)
def test_broken_config_files_are_one_line_and_exit_2(tmp_path, text, says):
  path = tmp_path / 'broken.py'
  path.write_text(text)
  code, _, err = run(f'--config={path}', f'--workdir={tmp_path}/run')
  assert code == 2
  assert 'Traceback' not in err
  assert err.splitlines()[-1].startswith('error: ')
  assert says in err.splitlines()[-1]


def test_early_interrupt_is_one_line(tmp_path):
  process = start(*_TINY, f'--workdir={tmp_path}')
  time.sleep(1.5)  # Importing, as a rule; all that matters is: any time.
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 75
  assert 'Traceback' not in err
  assert 'run the same command' in err.splitlines()[-1]


def test_mistakes_found_later_are_one_line_and_exit_2(tmp_path):
  mine = tmp_path / 'my recipe.py'  # In another folder, run from there.
  mine.write_text((_ROOT / 'configs/quickstart.py').read_text())
  code, _, err = run(
    '--config=my recipe.py:lit', '--config.data.split=trian', cwd=tmp_path
  )
  assert code == 2
  assert 'Traceback' not in err
  first, *_, last = err.splitlines()
  assert 'workdir: runs/my_recipe_lit (--workdir=DIR' in first
  assert last.startswith('error: data.split=trian')


@pytest.mark.parametrize(
  ('config', 'folder'),
  [
    ('configs/vit_b16.py', 'runs/vit_b16'),
    ('configs/vit_b16.py:', 'runs/vit_b16'),
    (f'{_ROOT}/configs/vit_b16.py:laion400m', 'runs/vit_b16_laion400m'),
    ('configs/robustness.py:imagenet,imagenet_a',
     'runs/robustness_imagenet_imagenet_a'),
  ],
)  # fmt: skip
def test_the_folder_of_a_config(config, folder, monkeypatch):
  monkeypatch.chdir(_ROOT)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  monkeypatch.setattr(cli.flags, 'FLAGS', values)
  values(['', f'--config={config}'])
  assert cli.workdir() == pathlib.Path(folder)
  values(['', f'--config={config}', '--workdir=/else/where'])
  assert cli.workdir() == pathlib.Path('/else/where')


def test_other_configs_are_named_from_another_folder(tmp_path):
  code, out, err = run('--config=vit_b16', cwd=tmp_path)
  assert (code, out) == (2, '')
  assert f'did you mean {_ROOT}/configs/vit_b16.py?' in err


def test_report_of_nothing(tmp_path):
  code, _, err = run(tmp_path, module='mlcd_jax.report')
  assert (code, err.count('\n')) == (2, 1)
  assert 'results.json' in err


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_is_short_and_has_an_example(flag):
  code, out, err = run(flag)
  assert (code, err) == (0, '')
  assert 'python -m mlcd_jax.main --config=' in out
  assert len(out.splitlines()) < 40


@pytest.mark.parametrize(
  ('module', 'arguments', 'says'),
  [
    ('plan', (), '--config is missing; there are configs/'),
    ('plan', ('--config=configs/vit_b16.py',), 'such as v5e:16x16'),
    ('check_data', (), '--config is missing; there are configs/'),
    ('convert', (), '`import SRC DST` or `export WORKDIR DST`'),
    ('report', (), 'name one or more workdirs; there are runs/one, runs/two'),
  ],
)
def test_commands_with_too_little(tmp_path, module, arguments, says):
  for name in ('one', 'two'):
    (tmp_path / 'runs' / name).mkdir(parents=True)
    (tmp_path / 'runs' / name / 'results.json').write_text('{}')
  cwd = tmp_path if module == 'report' else _ROOT
  code, out, err = run(*arguments, module=f'mlcd_jax.{module}', cwd=cwd)
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert err.startswith('error: ') and says in err


def test_terminated_run_saves_exits_75_and_goes_on(tmp_path):
  arguments = (*_TINY, f'--workdir={tmp_path}', '--config.train.steps=100000')
  process = start(*arguments, '--stages=embed,cluster,train')
  metrics = tmp_path / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  # A spot machine is taken away 30 seconds after the notice.
  _, err = process.communicate(timeout=30)
  assert process.returncode == 75
  assert 'after saving; run the same command' in err.splitlines()[-1]
  saved = checkpoint.latest_step(tmp_path / 'checkpoints')
  assert saved >= 5

  code, _, err = run(
    *arguments, '--stages=train', '--config.train.stop_after_steps=3'
  )
  assert code == 0, err
  assert f'continuing from step {saved}' in err
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert [r['step'] for r in lines] == list(range(1, saved + 4))
