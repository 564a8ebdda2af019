"""What a `data.path` stands for, where names have special characters."""

import os
import shutil

import fsspec
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import storage
from tests.data import shards


def make(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)


def find(folder, pattern, suffix='.tar'):
  found = storage.find(f'{folder}/{pattern}', [suffix])
  return [f.path.removeprefix(f'{folder}/') for f in found]


@pytest.mark.parametrize(
  ('pattern', 'expected'),
  [
    ('photos [2024]', ['photos [2024]/0.tar', 'photos [2024]/1.tar']),
    ('photos [2024]/', ['photos [2024]/0.tar', 'photos [2024]/1.tar']),
    ('photos [2024]/*.tar', ['photos [2024]/0.tar', 'photos [2024]/1.tar']),
    ('photos [2024]/1.tar', ['photos [2024]/1.tar']),
    ('photos [2024]/{1..1}.tar', ['photos [2024]/1.tar']),
    ('photos [24]/*.tar', ['photos 2/2.tar', 'photos 4/4.tar']),
    ('what?.tar', ['what?.tar']),
    ('{0..1}.tar', ['{0..1}.tar']),
    ('*/[01].tar', ['photos [2024]/0.tar', 'photos [2024]/1.tar']),
    ('photos ?/*', ['photos 2/2.tar', 'photos 4/4.tar']),
  ],
)  # fmt: skip
@pytest.mark.parametrize('remote', [False, True])
def test_what_is_there_is_meant_as_it_stands(
  tmp_path, pattern, expected, remote
):
  make(
    tmp_path, 'photos [2024]/0.tar', 'photos [2024]/1.tar', 'photos 2/2.tar',
    'photos 4/4.tar', 'what?.tar', 'whats.tar', '{0..1}.tar', 'x.txt',
  )  # fmt: skip
  root = str(tmp_path)
  if remote:
    memory = fsspec.filesystem('memory')
    root = f'memory:///{tmp_path.name}'
    if not memory.exists(f'/{tmp_path.name}'):
      memory.put(f'{tmp_path}/', f'/{tmp_path.name}', recursive=True)
  assert find(root, pattern) == expected


@pytest.mark.parametrize('pattern', ['*', '[01]*', '0*', '', '*.*'])
def test_our_own_and_other_files_are_left_out(tmp_path, pattern):
  make(
    tmp_path, '0.tar', '0.tar.index.npz', '.0.tar.index.npz.12ab.tmp',
    '0.parquet', '0_stats.json', '._0.tar', '.cache/1.tar', '__MACOSX/2.tar',
  )  # fmt: skip
  assert find(tmp_path, pattern) == ['0.tar']


def test_a_glob_takes_files_of_any_name(tmp_path):
  make(tmp_path, '0', '0.index.npz', '1', 'lost+found/2')
  assert find(tmp_path, '*') == ['0', '1']


@pytest.mark.parametrize('pattern', ['', '*.tar', '1.tar', '{0..1}.tar'])
def test_a_link_to_nothing_is_named(tmp_path, pattern):
  make(tmp_path, '0.tar')
  os.symlink('/annex/x', tmp_path / '1.tar')
  os.symlink('/annex/y', tmp_path / 'README')
  with pytest.raises(errors.UserError) as e:
    find(tmp_path, pattern)
  assert f'{tmp_path}/1.tar: cannot be read (a link to /annex/x' in str(e.value)


def test_remote_folders_are_walked_without_system_entries(tmp_path):
  memory = fsspec.filesystem('memory')
  for name in ('a.jpg', 'b/c.jpg', '.git/d.jpg', 'b/@eaDir/e.jpg', '.f.jpg'):
    memory.pipe_file(f'/walked/{name}', b'x')
  assert storage.walk('memory://walked') == ['a.jpg', 'b/c.jpg']


def test_folders_of_a_glob(tmp_path):
  make(tmp_path, 'a/x/0', 'a/.git/0', 'a/__MACOSX/0', '.b/y/0', 'file')
  found = storage.folders(f'{tmp_path}/*/*')
  assert [os.path.relpath(path, tmp_path) for path in found] == ['a/x']


@pytest.mark.parametrize(
  ('source', 'path'),
  [
    ('folder', '~/d'),
    ('folder', '~/{split}'),
    ('webdataset', '~/d'),
    ('webdataset', '~/d/*.tar'),
    ('webdataset', '~/d/{0..0}.tar'),
    ('parquet', '~/d/0.parquet'),
  ],
)
def test_home(tmp_path, monkeypatch, source, path):
  home = tmp_path
  monkeypatch.setenv('HOME', str(home))
  (home / 'd/class').mkdir(parents=True)
  shutil.copytree(home / 'd', home / 'train')
  for folder in ('d', 'train'):
    (home / folder / 'class/0.jpg').write_bytes(shards.jpeg(0))
  shards.tar(home / 'd/0.tar', [('0.jpg', shards.jpeg(0))])
  shards.parquet(home / 'd/0.parquet', 1)
  (home / 'bad').write_text('other')
  config = config_lib.default()
  config.data.update(
    source=source, path=path, cache_dir='~/cache', bad_keys='~/bad'
  )
  assert sources.make(config.data)[0]['image'] == shards.jpeg(0)
  assert (home / 'cache').exists() == (source == 'parquet')
