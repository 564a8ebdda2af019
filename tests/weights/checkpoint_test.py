"""Checkpoints: damage, other models, full disks, retention."""

import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax.runtime import errors
from mlcd_jax.weights import checkpoint


def state(step, width=200):
  key = jax.random.fold_in(jax.random.key(0), step)
  return {
    'step': jnp.int32(step),
    'params': {'w': jax.random.normal(key, (300, width))},
  }


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def save(folder, *steps, **options):
  checkpointer = checkpoint.Checkpointer(folder, **options)
  for step in steps:
    checkpointer.save(step, state(step))
  checkpointer.close()


@pytest.fixture(name='folder')
def fixture_folder(tmp_path):
  folder = tmp_path / 'checkpoints'
  save(folder, 4, 8)
  return folder


def restore_latest(folder):
  checkpointer = checkpoint.Checkpointer(folder)
  try:
    return checkpointer.restore_latest(abstract(state(0)))
  finally:
    checkpointer.close()


def assert_restores(folder, step):
  restored, found = restore_latest(folder)
  assert found == step
  jax.tree.map(np.testing.assert_array_equal, restored, state(step))


def largest(folder):
  return max(
    (p for p in folder.rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def flip_a_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)


def test_the_last_one_is_restored(folder):
  assert_restores(folder, 8)


def test_none_is_none(tmp_path):
  assert restore_latest(tmp_path / 'new') is None


@pytest.mark.parametrize(
  'damage',
  [
    lambda f: os.truncate(largest(f), largest(f).stat().st_size // 2),
    lambda f: flip_a_byte(largest(f)),
    lambda f: largest(f).unlink(),
    lambda f: shutil.rmtree(f / 'default/ocdbt.process_0'),
    lambda f: shutil.rmtree(f / 'default'),
    lambda f: (f / 'sha256.json').write_text('{'),
  ],
  ids=['truncated', 'flipped', 'file', 'folder', 'item', 'digests'],
)
def test_a_damaged_one_is_skipped(folder, damage, caplog):
  damage(folder / '8')
  with caplog.at_level('WARNING', logger='mlcd_jax'):
    assert_restores(folder, 4)
  assert 'checkpoint 8 is damaged and skipped' in caplog.text
  # It can be written anew, and is found again.
  save(folder, 8)
  assert_restores(folder, 8)


@pytest.mark.parametrize('name', ['manifest.ocdbt', 'd', 'ocdbt.process_0'])
def test_damage_is_found_without_digests(folder, name):
  (folder / '8/sha256.json').unlink()
  path = folder / '8/default' / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert_restores(folder, 4)


class Evil:
  """Touches a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self._path,)


def test_no_file_of_a_checkpoint_is_ever_run(tmp_path):
  owned = tmp_path / 'owned'
  evil = pickle.dumps(Evil(owned))
  save(tmp_path / 'good', 4, 8)
  names = [
    p.relative_to(tmp_path / 'good/8')
    for p in sorted((tmp_path / 'good/8').rglob('*'))
    if p.is_file() and p.name != 'sha256.json'
  ]
  assert len(names) > 5
  for name in names:
    folder = tmp_path / str(name).replace('/', '_')
    shutil.copytree(tmp_path / 'good', folder)
    (folder / '8/sha256.json').unlink()  # Or that would find it first.
    (folder / '8' / name).write_bytes(evil)
    _, step = restore_latest(folder)
    assert step in (4, 8), name
    wanted = {'params': {'w': abstract(state(0))['params']['w']}}
    try:
      checkpoint.restore_part(folder, step, wanted)
    except errors.UserError:
      pass
    assert not owned.exists(), name
  pickle.loads(evil)
  assert owned.exists()


def test_digests_do_not_lead_out_of_the_folder(folder, tmp_path, caplog):
  os.mkfifo(tmp_path / 'outside')  # Whoever reads it waits for ever.
  for name in ('../../outside', str(tmp_path / 'outside')):
    (folder / '8/sha256.json').write_text(json.dumps({name: '0'}))
    with caplog.at_level('WARNING', logger='mlcd_jax'):
      with pytest.raises(errors.UserError, match='which lies elsewhere'):
        checkpoint.Checkpointer(folder).restore(8, abstract(state(0)))
  assert_restores(folder, 4)


def test_all_damaged_is_said(folder):
  for step in (4, 8):
    flip_a_byte(largest(folder / str(step)))
  with pytest.raises(errors.UserError, match='none of .*8, 4.*train anew'):
    restore_latest(folder)


def test_another_model_is_refused_by_parameter(folder):
  other = abstract(state(0, width=100))
  other['params']['bias'] = other['step']
  checkpointer = checkpoint.Checkpointer(folder)
  with pytest.raises(errors.UserError) as e:
    checkpointer.restore_latest(other)
  checkpointer.close()
  assert 'params/bias is missing there and int32[] here' in str(e.value)
  assert 'params/w is float32[300, 200] there and float32[300, 100]' in str(
    e.value
  )
  assert (folder / '8').exists()


def test_retention(tmp_path):
  save(tmp_path / 'a', *range(1, 8), keep=3)
  assert {p.name for p in (tmp_path / 'a').iterdir()} == {'5', '6', '7'}
  save(tmp_path / 'b', *range(1, 8), keep=1, keep_every_steps=3)
  assert {p.name for p in (tmp_path / 'b').iterdir()} == {'3', '6', '7'}


@pytest.mark.parametrize(
  ('best_is', 'kept'), [('lowest', {'3', '6'}), ('highest', {'2', '6'})]
)
def test_the_best_one_stays(tmp_path, best_is, kept, caplog):
  caplog.set_level('INFO', logger='mlcd_jax')
  losses = {1: 5.0, 2: 9.0, 3: 1.0, 4: float('nan'), 5: None, 6: 4.0}
  options = {'keep': 1, 'keep_best': 'train/loss', 'best_is': best_is}
  for steps in ((1, 2, 3), (4, 5, 6)):  # Also across restarts.
    checkpointer = checkpoint.Checkpointer(tmp_path, **options)
    for step in steps:
      metrics = {'train/gradient_norm': 1.0, 'train/loss': losses[step]}
      if losses[step] is None:
        del metrics['train/loss']
      checkpointer.save(step, state(step), metrics)
    if 5 in steps:
      assert 'checkpoint 5 cannot be the best: train.keep_best' in caplog.text
    caplog.clear()
    checkpointer.close()
  assert {p.name for p in tmp_path.iterdir()} == kept
  (best,) = kept - {'6'}
  assert f'checkpoint {best} is the best by train/loss' in caplog.text
  assert_restores(tmp_path, 6)


def test_the_best_one_stays_beside_the_last_and_every_so_many(tmp_path):
  checkpointer = checkpoint.Checkpointer(
    tmp_path, keep=2, keep_every_steps=4, keep_best='a'
  )
  for step in range(1, 11):
    checkpointer.save(step, state(step), {'a': abs(step - 3)})
  checkpointer.close()
  assert {p.name for p in tmp_path.iterdir()} == {'3', '4', '8', '9', '10'}


@pytest.fixture(name='small_disk')
def fixture_small_disk(tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=600k', 'none', folder],
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip('mounting a tmpfs needs root')
  yield folder
  subprocess.run(['umount', folder], check=True)


def test_a_full_disk_leaves_the_last_good_one(small_disk):
  folder = small_disk / 'checkpoints'
  save(folder, 1)
  with pytest.raises(errors.RunError, match='no space left') as e:
    save(folder, 2, 3, 4, keep=5)
  last = int(re.search('last good checkpoint is ([0-9]);', str(e.value))[1])
  assert 1 <= last < 4
  assert_restores(folder, last)
