"""Folders are walked once, without what systems put into them."""

import os

import pytest

from mlcd_jax.runtime import entries


def make(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')


def walk(root):
  return entries.walk(str(root), None)


@pytest.mark.parametrize(
  'name',
  [
    '.ipynb_checkpoints/a-checkpoint.jpg',
    'b/.git/a.jpg',
    '__MACOSX/._a.jpg',
    'b/__MACOSX/a.jpg',
    '@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg',
    'lost+found/a.jpg',
    '$RECYCLE.BIN/a.jpg',
    'System Volume Information/a.jpg',
    'Thumbs.db',
    'b/desktop.ini',
    '.DS_Store',
    'b/._a.jpg',
  ],
)
def test_system_entries_are_left_out(tmp_path, name):
  make(tmp_path, 'a.jpg', 'b/c.jpg', name)
  assert walk(tmp_path) == ['a.jpg', 'b/c.jpg']


def test_a_root_may_be_hidden_itself(tmp_path):
  make(tmp_path, '.cache/lost+found/a.jpg')
  assert walk(tmp_path / '.cache/lost+found') == ['a.jpg']


@pytest.mark.parametrize(
  ('link', 'target', 'more'),
  [
    ('d/up', '..', []),  # To the root.
    ('d/here', '.', []),
    ('up', '../..', []),  # To what holds the root, and other data.
    ('a_link', 'd', []),  # The real place counts, whatever comes first.
    ('z/link', '../d', []),
    ('loop', 'loop', ['loop']),  # To itself: cannot be read.
    ('x', '../other', ['x/5.jpg', 'x/e/6.jpg']),
    ('x', '/proc/self/cwd/no/such', ['x']),
  ],
)
def test_each_real_folder_once(tmp_path, link, target, more):
  root = tmp_path / 'data/root'
  make(root, '1.jpg', 'd/2.jpg', 'z/3.jpg')
  make(tmp_path / 'data', 'other/5.jpg', 'other/e/6.jpg')
  os.symlink(target, root / link)
  assert walk(root) == sorted(['1.jpg', 'd/2.jpg', 'z/3.jpg', *more])


def test_of_links_to_the_same_folder_the_first_counts(tmp_path):
  root = tmp_path / 'root'
  make(root, '1.jpg')
  make(tmp_path, 'other/e/2.jpg', 'other/3.jpg')
  os.symlink('../other', root / 'b')
  os.symlink('../other/e', root / 'a')
  os.symlink('../other', root / 'c')
  os.symlink('../root', tmp_path / 'other/back')
  assert walk(root) == ['1.jpg', 'a/2.jpg', 'b/3.jpg']


def test_links_to_files_and_pipes(tmp_path):
  make(tmp_path, 'a.jpg')
  os.symlink('a.jpg', tmp_path / 'b.jpg')
  os.symlink('none.jpg', tmp_path / 'c.jpg')
  os.mkfifo(tmp_path / 'd.jpg')  # Reading it would never end.
  assert walk(tmp_path) == ['a.jpg', 'b.jpg', 'c.jpg']


def test_names_that_are_no_text(tmp_path):
  (tmp_path / os.fsdecode(b'caf\xe9.jpg')).write_text('')
  assert [os.fsencode(name) for name in walk(tmp_path)] == [b'caf\xe9.jpg']


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
  make(tmp_path, 'a.jpg', 'b/c.jpg')
  listed = os.scandir

  def scandir(path):
    if str(path).endswith('/b'):
      raise PermissionError(13, 'Permission denied', path)
    return listed(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  found = []
  names = entries.walk(str(tmp_path), lambda *args: found.append(args))
  assert names == ['a.jpg']
  ((path, error),) = found
  assert path == f'{tmp_path}/b' and isinstance(error, PermissionError)
