"""A cache that cannot be written is named, or done without."""

import errno
import fcntl
import os
import pwd
import resource

import fsspec
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.data import tar_index
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from tests.data import shards


def data(source, path, cache_dir=''):
  config = config_lib.default()
  config.data.source, config.data.path = source, str(path)
  config.data.cache_dir = str(cache_dir)
  return config.data


@pytest.fixture(name='no_home')
def fixture_no_home(monkeypatch):
  def unknown(uid):
    raise KeyError(uid)

  for name in ('HOME', 'XDG_CACHE_HOME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', unknown)


def _parquet(folder):
  shards.parquet(folder / '0.parquet', 4)
  return data('parquet', folder)


def _remote_array_record(folder):
  path = folder / '0.array_record'
  shards.array_record(path, 4)
  fsspec.filesystem('memory').put(str(path), f'/{folder.name}/0.array_record')
  return data('array_record', f'memory://{folder.name}')


def test_no_home_names_the_field(no_home, tmp_path):
  for make in (_parquet, _remote_array_record):
    with pytest.raises(errors.UserError, match='^data.cache_dir: there is no'):
      sources.make(make(tmp_path))


@pytest.mark.parametrize('make', [_parquet, _remote_array_record])
@pytest.mark.parametrize('by', ['field', 'XDG_CACHE_HOME', 'HOME'])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch, make, by):
  (tmp_path / 'file').write_text('')  # In its place; root may write anywhere.
  config = make(tmp_path)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  if by == 'field':
    config.cache_dir = str(tmp_path / 'file')
  else:
    monkeypatch.setenv(by, str(tmp_path / 'file'))
  with pytest.raises(errors.UserError) as e:
    sources.make(config)
  assert str(e.value).startswith(f'data.cache_dir={tmp_path}/file')
  assert 'cannot be written' in str(e.value)


@pytest.mark.parametrize('make', [_parquet, _remote_array_record])
def test_a_full_disk_is_named(tmp_path, make):
  config = make(tmp_path)
  config.cache_dir = str(tmp_path / 'cache')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
  try:
    with pytest.raises(errors.RunError) as e:
      sources.make(config)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert str(e.value) == (
    f'data.cache_dir={tmp_path}/cache: cannot be written (File too large); '
    'make space there, or name another folder for copies of the data'
  )
  assert not os.listdir(tmp_path / 'cache')
  assert len(sources.make(config)) == 4  # And nothing broken was left.


def test_the_data_are_blamed_for_what_is_theirs(tmp_path, monkeypatch):
  from mlcd_jax.data import parquet

  def broken(*args, **kwargs):
    raise OSError(errno.EIO, 'Input/output error')
    yield

  config = _parquet(tmp_path)
  config.cache_dir = str(tmp_path / 'cache')
  monkeypatch.setattr(parquet.pq.ParquetFile, 'iter_batches', broken)
  with pytest.raises(errors.UserError, match='^data.path=.*0.parquet: cannot'):
    sources.make(config)


def test_indices_are_not_needed(no_home, tmp_path, monkeypatch):
  shards.tar(tmp_path / '0.tar', [('0.jpg', shards.jpeg(0))])
  said = []
  monkeypatch.setattr(
    tar_index._log, 'warning', lambda text, *args: said.append(text % args)
  )

  def full(path):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(files, 'atomic', full)
  assert len(sources.make(data('webdataset', tmp_path))) == 1
  assert len(sources.make(data('webdataset', tmp_path))) == 1
  (line,) = said
  assert str(tmp_path) in line and 'No space left on device' in line


@pytest.mark.parametrize('code', ['ENOSYS', 'ENOLCK', 'EOPNOTSUPP'])
def test_the_digits_without_locks(monkeypatch, code):
  def flock(file, operation):
    raise OSError(getattr(errno, code), code)

  monkeypatch.setattr(fcntl, 'flock', flock)
  assert len(sources.make(config_lib.default().data)) == 3_000


def test_the_digits_without_a_home(no_home, monkeypatch):
  from tensorflow_datasets.core import constants

  monkeypatch.setattr(
    constants, 'get_default_data_dir', lambda: '~/tensorflow_datasets'
  )
  with pytest.raises(errors.UserError, match='^data.data_dir=~.*no home'):
    sources.make(config_lib.default().data)


def test_copies_are_mapped_and_no_file_stays_open(tmp_path):
  for i in range(9):
    shards.parquet(tmp_path / f'{i}.parquet', 2)
  before = len(os.listdir('/proc/self/fd'))
  source = sources.make(data('parquet', tmp_path, tmp_path / 'cache'))
  assert source[17]['image'] == shards.jpeg(1)
  assert len(os.listdir('/proc/self/fd')) == before
