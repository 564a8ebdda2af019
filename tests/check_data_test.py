"""The command that lists bad images, and the run that leaves them out."""

import os
import subprocess
import sys

import cv2
import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import stages
from tests import commands


def _picture(folder, name, content=None):
  pixels = np.random.default_rng(len(name)).integers(
    0, 255, (28, 28, 3), np.uint8
  )
  content = cv2.imencode('.png', pixels)[1] if content is None else content
  (folder / name).write_bytes(bytes(content))


def _check_data(*args, cwd):
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'mlcd_jax.check_data',
      f'--config={commands.ROOT}/configs/quickstart.py',
      '--config.data.source=folder',
      *args,
    ],
    cwd=cwd,
    env=os.environ | {'PYTHONPATH': str(commands.ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_writes_the_bad_keys_and_a_run_leaves_them_out(tmp_path):
  images, workdir = tmp_path / 'images', tmp_path / 'runs/quickstart'
  images.mkdir()
  for i in range(20):
    _picture(images, f'{i:02d}.png')
  _picture(images, '05.png', b'')
  _picture(images, 'b\u00f6se.jpg', b'<html>')
  (images / 'annexed.jpg').symlink_to('../.git/annex/objects/x.jpg')
  done = _check_data('--config.data.path=images', cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  found = workdir / 'bad_keys.txt'
  assert done.stdout == (
    '3 bad (1 empty, 1 missing, 1 not an image); 3 keys written to '
    'runs/quickstart/bad_keys.txt\n'
  )
  assert found.read_text().splitlines() == [
    '05.png', 'annexed.jpg', 'b\u00f6se.jpg'
  ]  # fmt: skip
  assert 'check_data: b\u00f6se.jpg: not an image' in done.stderr

  config = config_lib.default()
  config.data.source, config.data.path = 'folder', str(images)
  config.cluster.num_centers = 10
  config.train.steps = 1
  stages.run(config, workdir, ('embed',))
  result = manifests.load(workdir / 'embeddings').result
  assert (result['num_records'], result['shard_rows']) == (19, [19])


def test_mistakes_are_one_line(tmp_path):
  done = _check_data(
    '--config.data.path=/nowhere', f'--workdir={tmp_path}', cwd=tmp_path
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: data.path=/nowhere: cannot be read')
  _picture(tmp_path, 'a.png')
  done = _check_data(
    '--config.data.path=.', '--workdir=/proc/nowhere', cwd=tmp_path
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: --workdir=/proc/nowh')
