"""~ is the home folder in every path, and an error where there is none."""

import pathlib
import pwd

import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.config import check as config_check
from mlcd_jax.embed import precomputed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths
from mlcd_jax.weights import export
from mlcd_jax.weights import hub


@pytest.fixture(name='home')
def fixture_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  return tmp_path


def test_expand(home):
  assert paths.expand('~/a b/*.tar') == f'{home}/a b/*.tar'
  assert paths.expand('~') == str(home)
  assert paths.expand('a/~/b') == 'a/~/b'
  assert paths.expand('~nobody_here/x') == '~nobody_here/x'
  assert paths.expand('s3://b/~/x') == 's3://b/~/x'
  assert paths.expand('file:///a/b') == '/a/b'
  assert paths.local(pathlib.Path('~/x')) == home / 'x'


def test_no_home(monkeypatch):
  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.delenv('HOME')
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  assert paths.home() is None
  assert paths.expand('/a', 'f') == '/a'
  with pytest.raises(errors.UserError, match='^data.path=~/x: there is no ho'):
    paths.expand('~/x', 'data.path')


def test_other_fields(home, tiny_config):
  (home / 'run').mkdir()
  tiny_config.cluster.path = '~/run'
  config_check.check(tiny_config)
  assert hub.resolve('~/run', 'x') == home / 'run'
  with pytest.raises(errors.UserError, match=f'^embed.path={home}/run: no emb'):
    precomputed.describe(_embed('~/run'))
  with pytest.raises(errors.UserError, match='^WORKDIR=~/run: an empty folder'):
    export.export('~/run', home / 'out')


def _embed(path):
  embed = config_lib.default().embed
  embed.embedder, embed.path = 'precomputed', path
  return embed
