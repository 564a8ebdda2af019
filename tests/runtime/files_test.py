"""Files are whole, of one writer, and nothing that they hold is ever run."""

from concurrent import futures
import errno
import fcntl
import logging
import os
import pathlib
import pickle
import tempfile
import time

import numpy as np
import pytest

from mlcd_jax.embed import row_files
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files


def test_temporary_names_are_of_one_writer_alone(tmp_path, monkeypatch):
  """Hosts of a job have the same pids, and containers the same names."""
  monkeypatch.setattr(os, 'getpid', lambda: 1)
  path = tmp_path / 'a.npy'
  with files.atomic(path) as first, files.atomic(path) as second:
    assert first != second and {first.parent, second.parent} == {tmp_path}
    first.write_text('first')
    second.write_text('second')
    assert (first.read_text(), second.read_text()) == ('first', 'second')
  assert path.read_text() == 'first'  # The last one to be whole.
  assert os.listdir(tmp_path) == ['a.npy']


def test_a_failed_write_leaves_what_was_there(tmp_path):
  path = tmp_path / 'a'
  path.write_text('before')
  with pytest.raises(ZeroDivisionError), files.atomic(path) as temporary:
    temporary.write_text('after')
    raise ZeroDivisionError
  assert path.read_text() == 'before' and os.listdir(tmp_path) == ['a']


def test_a_file_that_others_may_have_mapped_stays(tmp_path):
  path = tmp_path / 'a'
  with files.atomic(path, replace=False) as temporary:
    temporary.write_text('mine')
    path.write_text('theirs')
  assert path.read_text() == 'theirs' and os.listdir(tmp_path) == ['a']


def test_leftovers_go_and_living_writers_stay(tmp_path):
  dead = tmp_path / 'sub/.a.npy.0123456789abcdef.tmp'
  dead.parent.mkdir()
  dead.write_text('half')
  with files.atomic(tmp_path / 'sub/b.npy') as temporary:
    temporary.write_text('more')
    files.remove_leftovers(tmp_path)
    assert not dead.exists() and temporary.exists()
    temporary.write_text('whole')
  assert (tmp_path / 'sub/b.npy').read_text() == 'whole'


@pytest.fixture(name='no_locks', params=['ENOSYS', 'ENOLCK', 'EOPNOTSUPP'])
def fixture_no_locks(request, monkeypatch):
  """A file system without flock, as Lustre is often mounted."""

  def flock(file, operation):
    raise OSError(getattr(errno, request.param), request.param)

  monkeypatch.setattr(fcntl, 'flock', flock)


def test_leftovers_without_locks(no_locks, tmp_path):
  old, new = tmp_path / '.a.1.tmp', tmp_path / '.a.2.tmp'
  for path in (old, new):
    path.write_text('')
  os.utime(old, (1, 1))
  files.remove_leftovers(tmp_path)
  assert not old.exists() and new.exists()  # It may be written now.


def test_a_run_goes_on_without_locks(no_locks, tmp_path, caplog):
  with caplog.at_level(logging.WARNING, 'mlcd_jax.runtime.files'):
    with files.locked(tmp_path):
      files.write_json(tmp_path / 'a.json', 1)
  assert f'--workdir={tmp_path}: its file system has no locks' in caplog.text


def test_a_held_folder_is_refused(tmp_path):
  with files.locked(tmp_path):
    with pytest.raises(errors.UserError, match='in use by another process'):
      with files.locked(tmp_path):
        pass


@pytest.mark.parametrize(
  'array',
  [
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.float16),
    np.array(7),
    np.array([b'key', b'a']),
  ],
)
def test_arrays_are_mapped_and_no_file_stays_open(tmp_path, array):
  path = tmp_path / 'a.npy'
  files.write_npy(path, array)
  before = len(os.listdir('/proc/self/fd'))
  found = [files.read_npy(path) for _ in range(9)]
  assert len(os.listdir('/proc/self/fd')) == before
  for a in found:
    assert (a.dtype, a.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(a, array)
    assert not a.flags.owndata and not a.flags.writeable


@pytest.mark.parametrize('cut', [0, 5, 100, 128, 150])
def test_a_cut_array_is_named(tmp_path, cut):
  path = tmp_path / 'a.npy'
  files.write_npy(path, np.arange(6))
  os.truncate(path, cut)
  with pytest.raises(errors.UserError, match='a.npy: cannot be read as an ar'):
    files.read_npy(path)


@pytest.mark.parametrize(
  'read', [files.read_json, files.read_npy, files.read_npz]
)
def test_a_whole_file_is_not_to_be_deleted(tmp_path, read):
  """As where too many files are open."""
  with pytest.raises(errors.UserError) as e:
    read(tmp_path / 'none')
  assert str(e.value).startswith(f'{tmp_path}/none: cannot be read (No such')
  assert 'delete' not in str(e.value)


def test_no_space_for_what_workers_map(tmp_path, monkeypatch):
  def full(*args, allow_pickle):
    raise OSError(errno.ENOSPC, 'No space left on device')

  shared = files.SharedArray(np.arange(9))
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setattr(files.np, 'save', full)
  with pytest.raises(errors.RunError, match='No space left.*TMPDIR') as e:
    pickle.dumps(shared)
  assert str(tmp_path) in str(e.value) and not os.listdir(tmp_path)


class Evil:
  """Touches a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self._path,)


@pytest.fixture(name='malicious')
def fixture_malicious(tmp_path):
  path = tmp_path / 'img_emb/img_emb_00000.npy'
  path.parent.mkdir()
  evil = np.array([[Evil(tmp_path / 'owned')]], dtype=object)
  np.save(path, evil, allow_pickle=True)
  yield path
  assert not (tmp_path / 'owned').exists()


def test_the_malice_is_real(tmp_path):
  path = tmp_path / 'a.npy'
  evil = np.array([Evil(tmp_path / 'owned')], dtype=object)
  np.save(path, evil, allow_pickle=True)
  np.load(path, allow_pickle=True)
  assert (tmp_path / 'owned').exists()


def test_malicious_npy_is_refused(malicious):
  with pytest.raises(errors.UserError, match='img_emb_00000.npy: cannot be'):
    files.read_npy(malicious)


def test_malicious_embeddings_are_refused(malicious):
  with pytest.raises(errors.UserError, match='img_emb_00000.npy: object; rows'):
    shards.Embeddings(malicious.parent.parent, 1)


def test_nothing_asks_for_pickles():
  package = pathlib.Path(files.__file__).parent
  for path in package.rglob('*.py'):
    text = path.read_text()
    assert 'allow_pickle=True' not in text, path
    assert 'import pickle' not in text, path
    calls = sum(text.count(f'np.{f}(') for f in ('load', 'save', 'savez'))
    assert text.count('allow_pickle=False') == calls, path


def test_headers_of_arrays_are_parsed_one_at_a_time(tmp_path, monkeypatch):
  """Two at once can end in CPython 3.11's SystemError, see files.npy_header."""
  paths = [tmp_path / f'{i}.npy' for i in range(32)]
  for i, path in enumerate(paths):
    np.save(path, np.full((i + 1, 3), i, np.float16))
  parse, inside, most = np.lib.format.read_array_header_1_0, [], []

  def counted(header):
    inside.append(1)
    most.append(len(inside))
    time.sleep(0.001)  # Lets the other threads come in.
    found = parse(header)
    inside.pop()
    return found

  monkeypatch.setattr(np.lib.format, 'read_array_header_1_0', counted)
  with futures.ThreadPoolExecutor(8) as pool:
    whole = list(pool.map(files.read_npy, paths))
    rows = list(pool.map(lambda path: row_files.Npy(str(path)), paths))
  assert len(most) == 64 and max(most) == 1
  for i, (array, file) in enumerate(zip(whole, rows)):
    assert array.shape == file.shape == (i + 1, 3)
    assert (array == i).all() and (file.read(0, i + 1) == i).all()
