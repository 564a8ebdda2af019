"""Images in folders: which are taken, and what of those that cannot be read."""

import io
import logging
import os

import numpy as np
from PIL import Image
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.data import formats
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import problems
from tests.data import shards


def data(path, **fields):
  config = config_lib.default()
  config.data.source, config.data.path = 'folder', str(path)
  config.data.update(fields)
  return config.data


def put(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shards.jpeg(len(name)))


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize(
  'name', ['.ipynb_checkpoints', '__MACOSX', '@eaDir', 'lost+found']
)
def test_system_folders_are_no_classes(tmp_path, name, split):
  root = tmp_path / 'photos [2024]'
  for part in ('train', 'test'):
    put(root / part, 'green/0.jpg', 'red/1.jpg')
  put(root / split, f'{name}/0-checkpoint.jpg')
  put(root, f'{name}/blue/0.jpg')
  for part in ('train', 'test'):
    source = sources.make(data(f'{root}/{{split}}'), part)
    assert source.keys().tolist() == [b'green/0.jpg', b'red/1.jpg']
    assert list(source.class_names) == ['green', 'red']
    assert [source[i]['label'] for i in range(2)] == [0, 1]


def test_links_to_a_parent_do_not_multiply(tmp_path):
  put(tmp_path, 'train/a/0.jpg', 'train/b/1.jpg', 'test/a/2.jpg')
  os.symlink('..', tmp_path / 'train/a/up')
  os.symlink('../..', tmp_path / 'train/all')
  source = sources.make(data(tmp_path / 'train'))
  assert source.keys().tolist() == [b'a/0.jpg', b'b/1.jpg']
  assert list(source.class_names) == ['a', 'b']


def _dangling(path, monkeypatch):
  path.unlink()
  os.symlink('/annex/x', path)


def _denied(path, monkeypatch):
  _fails(path, monkeypatch, PermissionError(13, 'Permission denied'))


def _broken_disk(path, monkeypatch):
  _fails(path, monkeypatch, OSError(5, 'Input/output error'))


def _fails(path, monkeypatch, error):
  """Reading fails, as it does not for root."""
  from mlcd_jax.runtime import storage

  def open_(name, *args, **kwargs):
    if name == str(path):
      raise error
    return open(name, *args, **kwargs)

  monkeypatch.setattr(storage, 'open', open_, raising=False)


def _loop(path, monkeypatch):
  path.unlink()
  os.symlink(path.name, path)


@pytest.mark.parametrize(
  ('breaks', 'reason'),
  [
    (_dangling, 'missing'),
    (_loop, 'missing'),
    (_denied, 'unreadable'),
    (_broken_disk, 'unreadable'),
  ],
)
def test_a_file_that_cannot_be_read_is_one_bad_image(
  tmp_path, monkeypatch, breaks, reason
):
  put(tmp_path, *(f'{i}.jpg' for i in range(6)))
  breaks(tmp_path / '3.jpg', monkeypatch)
  source = sources.make(data(tmp_path))
  with pytest.raises(transforms.BadImage, match=f'^{reason}$'):
    transforms.decode(source[3]['image'])
  assert len(source) == 6
  batches = pipelines.ordered_batches(source, batch_size=6, image_size=28)
  assert next(batches)['weight'].tolist() == [1, 1, 1, 0, 1, 1]
  batches = pipelines.train_batches(
    source, np.arange(6), np.zeros((6, 1), np.int32), num_positives=1,
    batch_size=6, image_size=28, crop_area=(0.5, 1.0), flip=True, seed=0,
  )  # fmt: skip
  assert next(batches)['weight'].sum() == 5


def test_a_file_that_goes_while_it_is_read(tmp_path):
  put(tmp_path, 'a.jpg', 'b.jpg')
  source = sources.make(data(tmp_path))
  (tmp_path / 'a.jpg').unlink()
  with pytest.raises(transforms.BadImage, match='missing'):
    transforms.decode(source[0]['image'])
  assert source[1]['image'] == shards.jpeg(5)


def test_what_stops_more_than_one_file_stops_the_run(tmp_path, monkeypatch):
  put(tmp_path, 'a.jpg', 'b.jpg')
  source = sources.make(data(tmp_path))
  error = OSError(24, 'Too many open files')
  _fails(tmp_path / 'a.jpg', monkeypatch, error)
  with pytest.raises(errors.RunError, match='a.jpg: cannot be read'):
    source[0]


def test_folders_that_cannot_be_listed_are_counted(tmp_path, monkeypatch):
  put(tmp_path, 'a/0.jpg', 'b/1.jpg', 'c/d/2.jpg')
  os.symlink('/mnt/gone', tmp_path / 'e')
  listed = os.scandir

  def scandir(path):
    if str(path).endswith(('/b', '/c/d')):
      raise PermissionError(13, 'Permission denied', path)
    return listed(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  found = problems.Problems('test')
  source = sources.make(data(tmp_path), found=found)
  assert source.keys().tolist() == [b'a/0.jpg']
  assert found.counts == {'unreadable folder': 2, 'missing': 1}
  with pytest.raises(errors.UserError, match='3 of 4 images are bad .*2 unrea'):
    sources.make(data(tmp_path))


def _encode(suffix):
  image = Image.fromarray(
    np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
  )
  mode = {'.gif': 'P', '.pgm': 'L', '.pbm': '1'}.get(suffix, 'RGB')
  options = {'no_jp2': True} if suffix in ('.j2k', '.j2c', '.jpc') else {}
  kind = Image.registered_extensions().get(suffix, 'JPEG2000')
  out = io.BytesIO()
  image.convert(mode).save(out, kind, **options)
  return out.getvalue()


@pytest.mark.parametrize('suffix', formats.SUFFIXES)
def test_every_format_is_taken_and_decoded(tmp_path, suffix):
  (tmp_path / f'a{suffix}').write_bytes(_encode(suffix))
  shards.tar(tmp_path / '0.tar', [(f'a{suffix.upper()}', _encode(suffix))])
  tar = data(tmp_path, cache_dir=str(tmp_path / 'cache'))
  tar.source = 'webdataset'
  for source in (sources.make(data(tmp_path)), sources.make(tar)):
    assert len(source) == 1
    assert transforms.decode(source[0]['image']).shape == (20, 30, 3)


def test_what_is_no_image_by_its_name_is_said(tmp_path, caplog):
  put(tmp_path, 'a.jpg', 'b.heic', 'c.HEIC', 'd.txt', 'README')
  with caplog.at_level(logging.INFO, 'mlcd_jax.data.sources'):
    sources.make(data(tmp_path))
  (line,) = [m for m in caplog.messages if m.startswith('data: not used')]
  assert '0 bad, 4 left out (2 .heic, 1 ' in line


@pytest.mark.parametrize(
  'written',
  [
    b'b.jpg\nc\xc3\xb6.jpg\n',
    b'b.jpg\r\nc\xc3\xb6.jpg\r\n',
    b'\xef\xbb\xbfb.jpg\nc\xc3\xb6.jpg',
    b'\xef\xbb\xbfb.jpg\r\n\r\nc\xc3\xb6.jpg',
    'b.jpg\r\nc\u00f6.jpg\r\n'.encode('utf-16'),
  ],
)
def test_bad_keys_as_other_programs_write_them(tmp_path, written):
  put(tmp_path, 'a.jpg', 'b.jpg', 'c\u00f6.jpg')
  (tmp_path / 'bad.txt').write_bytes(written)
  source = sources.make(data(tmp_path, bad_keys=f'{tmp_path}/bad.txt'))
  assert source.keys().tolist() == [b'a.jpg']
