"""CLIP's text weights in, against numbers recorded from transformers.

The recorder is text_oracles.py.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mlcd_jax.runtime import errors
from mlcd_jax.weights import text
from mlcd_jax.weights import tokenizer

TESTS = pathlib.Path(__file__).parent.parent
GOLDENS = TESTS / 'text_goldens'
NAMES = ('old_end', 'new_end', 'both_towers')


def relative(found, expected):
  return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize('name', NAMES)
def test_agrees_with_transformers(name):
  model, variables = text.load(GOLDENS / name)
  golden = np.load(GOLDENS / name / 'golden.npz')
  encode = jax.jit(model.apply)
  for case in range(3):
    out = encode(variables, golden[f'{case}/ids'])
    for key in ('tokens', 'pooled', 'embedding'):
      assert relative(out[key], golden[f'{case}/{key}']) < 1e-5, (case, key)


def test_both_rules_of_the_end_are_recorded():
  ends = [text.load(GOLDENS / name)[0].end_token for name in NAMES]
  assert ends == [-1, 30, 39]


def test_clip_folders_with_a_vision_tower_load():
  folder = TESTS / 'goldens/clip_with_text'
  model, variables = text.load(folder)
  assert text.is_there(folder) and not text.is_there(TESTS / 'goldens/clip')
  assert model.embedding_dim == 6
  out = model.apply(variables, np.array([[1, 4, 10, 0]]))['embedding']
  assert out.shape == (1, 6) and np.isfinite(out).all()


def test_folders_without_a_text_tower_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match='clip_vision_model.*no text'):
    text.load(TESTS / 'goldens/clip')
  with pytest.raises(errors.UserError, match='no config.json'):
    text.load(tmp_path)


def test_wrong_tensors_are_listed_by_name(tmp_path):
  folder = shutil.copytree(GOLDENS / 'both_towers', tmp_path / 'clip')
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  del tensors['text_model.final_layer_norm.bias']
  safetensors_numpy.save_file(tensors, path)
  with pytest.raises(
    errors.UserError, match='missing: text_model.final_layer_norm.bias'
  ):
    text.load(folder)


def test_unknown_activations_are_refused(tmp_path):
  folder = shutil.copytree(GOLDENS / 'old_end', tmp_path / 'clip')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'hidden_act': 'x'}))
  with pytest.raises(errors.UserError, match="hidden_act='x' is unknown"):
    text.load(folder)


def test_tokenizer_of_the_folder_comes_first(tmp_path):
  model, _ = text.load(GOLDENS / 'old_end')
  with pytest.raises(errors.UserError, match='vocabulary of 40 is not'):
    text.load_tokenizer(GOLDENS / 'old_end', model)
  clips_own = tokenizer.load(tmp_path, 5, tokenizer.VOCAB_SIZE)
  clips_own.save(tmp_path / 'tokenizer.json')
  words = tokenizer.load(tmp_path, 5, tokenizer.VOCAB_SIZE + 10)
  np.testing.assert_array_equal(words(['a b c d']), clips_own(['a b c d']))
  with pytest.raises(errors.UserError, match='49408 tokens, the text tower 40'):
    tokenizer.load(tmp_path, 5, 40)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(errors.UserError, match='tokenizer.json: cannot be read'):
    tokenizer.load(tmp_path, 5, 40)
