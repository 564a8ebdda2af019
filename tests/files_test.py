"""Nothing that a file holds is ever run."""

import pathlib

import numpy as np
import pytest

from mlcd_jax import embeddings
from mlcd_jax import errors
from mlcd_jax import files


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
    embeddings.Embeddings(malicious.parent.parent, 1)


def test_nothing_asks_for_pickles():
  package = pathlib.Path(files.__file__).parent
  for path in package.rglob('*.py'):
    text = path.read_text()
    assert 'allow_pickle=True' not in text, path
    assert 'import pickle' not in text, path
    calls = sum(text.count(f'np.{f}(') for f in ('load', 'save', 'savez'))
    assert text.count('allow_pickle=False') == calls, path
