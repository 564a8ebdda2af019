"""CLIP's tokens, against those recorded from transformers' CLIPTokenizer."""

import hashlib
import importlib.resources
import json
import pathlib

import numpy as np
import pytest

from mlcd_jax.weights import tokenizer

GOLDEN = pathlib.Path(__file__).parent.parent / 'text_goldens/tokens.json'


@pytest.fixture(name='clip', scope='module')
def fixture_clip():
  return tokenizer.clip()


def test_agrees_with_transformers(clip):
  golden = json.loads(GOLDEN.read_text())
  found = clip(list(golden))
  assert found.dtype == np.int32
  for text, ids, expected in zip(golden, found, golden.values()):
    assert ids.tolist() == expected, text


def test_vocabulary_is_the_published_file():
  file = importlib.resources.files('mlcd_jax') / 'assets/clip_bpe.txt.gz'
  assert hashlib.sha256(file.read_bytes()).hexdigest() == (
    '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
  )


def test_long_texts_keep_start_and_end(clip):
  ids = clip(['word ' * 500, 'word ' * 75, 'word ' * 74])
  assert ids.shape == (3, 77)
  assert (ids[:, 0] == 49_406).all() and (ids[:, -1] == 49_407).all()
  np.testing.assert_array_equal(ids[0], ids[1])
  assert ids[2, -2] == 49_407 and ids[1, -2] != 49_407


def test_empty_texts_and_none(clip):
  assert clip(['']).tolist() == [[49_406] + [49_407] * 76]
  assert clip([]).shape == (0, 77)


def test_context_is_free():
  ids = tokenizer.clip(4)(['a photo of a cat', 'a'])
  assert ids.tolist() == [
    [49_406, 320, 1_125, 49_407],
    [49_406, 320, 49_407, 49_407],
  ]
