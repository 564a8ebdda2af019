"""When the page is written, and what it says of a run that is not finished."""

import json
import os
import re

import pytest

from mlcd_jax import sharding
from mlcd_jax.page import sections
from mlcd_jax.page import writer
from mlcd_jax.runtime import errors

_FOLDERS = {
  'embed': 'embeddings',
  'cluster': 'clusters',
  'train': 'checkpoints',
  'evaluate': 'evaluation',
}


def make(config, workdir):
  return writer.Page(
    config,
    workdir,
    folders={stage: workdir / name for stage, name in _FOLDERS.items()},
    mesh=sharding.make_mesh(),
    preset=None,
  )


@pytest.fixture(name='page')
def fixture_page(tiny_config, tmp_path):
  return make(tiny_config, tmp_path / 'run')


def data(tmp_path):
  page = (tmp_path / 'run/report.html').read_text()
  return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def test_nothing_is_written_before_a_stage(page, tmp_path):
  assert not (tmp_path / 'run').exists()
  with page.stage('embed'):
    assert data(tmp_path)['status']['text'] == 'embed is running'
  assert data(tmp_path)['status'] == {
    'text': 'not finished',
    'done': False,
    'failed': False,
  }


def test_what_ended_a_stage_is_said(page, tmp_path):
  with pytest.raises(errors.RunError):
    with page.stage('train'):
      raise errors.RunError('the loss is <b>nan</b>')
  status = data(tmp_path)['status']
  assert status['failed'] and 'the loss is <b>nan</b>' in status['text']


def test_seconds_of_a_stage_add_up(page, tmp_path):
  for _ in range(2):
    with page.stage('embed'):
      pass
  kept = tmp_path / 'run/report/seconds.json'
  kept.write_text('{"embed": 100.0}')
  with page.stage('embed'):
    pass
  assert json.loads(kept.read_text())['embed'] >= 100
  assert data(tmp_path)['stages'][0]['seconds'] >= 100


def test_refreshed_once_a_minute(page, tmp_path):
  page.write()
  path = tmp_path / 'run/report.html'
  path.unlink()
  page.refresh()
  assert not path.exists()
  page.refresh(every_seconds=0)
  assert path.exists()


def test_a_page_that_cannot_be_made_ends_no_run(
  page, tmp_path, monkeypatch, caplog
):
  def broken(*args, **kwargs):
    raise ZeroDivisionError('x')

  monkeypatch.setattr(sections, 'bad_data', broken)
  with caplog.at_level('WARNING'), page.stage('embed'):
    pass
  assert not (tmp_path / 'run/report.html').exists()


def test_a_part_that_cannot_be_made_is_left_out(page, tmp_path, monkeypatch):
  called = []

  def browsers(*args, **kwargs):
    called.append(args)
    raise ZeroDivisionError('x')

  monkeypatch.setattr(sections, 'browsers', browsers)
  with page.stage('embed'):
    pass
  assert data(tmp_path)['clusters'] is None
  assert len(called) == 1  # And warned once.


def test_what_differs_from_the_preset(tiny_config):
  changed = tiny_config.copy_and_resolve_references()
  changed.train.batch_size = 64
  fields = sections.config_fields(changed, tiny_config)
  assert [f for f in fields if f['changed']] == [
    {
      'field': 'train.batch_size',
      'value': '64',
      'preset': '32',
      'changed': True,
    }
  ]
  assert len(fields) > 60


def test_patches_are_shown_once_they_are_kept(page, tmp_path, monkeypatch):
  shown = [{'key': 'x', 'image': '', 'colours': ''}]
  monkeypatch.setattr(sections, 'patch_colours', lambda *args: shown)
  page.show_patches(encoder=None, source=None)
  page.write()
  assert data(tmp_path)['patches'] == shown


def test_patches_that_cannot_be_made_are_left_out(page, tmp_path):
  page.show_patches(encoder=None, source=[])
  page.write()
  assert data(tmp_path)['patches'] == []


def test_a_page_that_a_kill_prevented_is_written_later(page, tmp_path):
  path = tmp_path / 'run/report.html'
  page.finish()
  assert not path.exists()  # Nothing is made yet.
  (tmp_path / 'run/evaluation').mkdir(parents=True)
  made = tmp_path / 'run/evaluation/manifest.json'
  made.write_text('{}')
  page.finish()
  before = path.stat().st_mtime_ns
  page.finish()
  assert path.stat().st_mtime_ns == before
  os.utime(made, ns=(before + 1, before + 1))
  page.finish()
  assert path.stat().st_mtime_ns != before


def test_what_a_kill_left_is_removed(tiny_config, tmp_path):
  left = tmp_path / 'run/.report.html.123.tmp'
  kept = tmp_path / 'run/report/.browsers.json.123.tmp'
  for path in (left, kept):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  make(tiny_config, tmp_path / 'run')
  assert not left.exists() and not kept.exists()
