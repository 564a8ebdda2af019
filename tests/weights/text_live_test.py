"""Text parity with transformers itself, where it and torch are installed."""

import jax
import numpy as np
import pytest

from mlcd_jax.weights import text
from mlcd_jax.weights import tokenizer
from tests.weights import text_oracles as oracles

pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

OTHERS = {
  'old_end': dict(hidden_size=33, num_attention_heads=3, num_hidden_layers=3),
  'new_end': dict(hidden_size=10, num_attention_heads=1, vocab_size=70),
  'both_towers': dict(max_position_embeddings=20, hidden_act='gelu'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_same_features(name, tmp_path):
  model = oracles.make(name, seed=3, **OTHERS[name])
  model.save_pretrained(tmp_path)
  ours, variables = text.load(tmp_path)
  for length in (ours.context, 5):
    ids = oracles.tokens(model, length, seed=4)
    out = jax.jit(ours.apply)(variables, ids)
    for key, value in oracles.outputs(model, ids).items():
      error = np.abs(out[key] - value).max() / np.abs(value).max()
      assert error < 1e-5, (length, key)


def test_same_tokens_of_random_texts():
  theirs, ours = oracles.clip_tokenizer(), tokenizer.clip()
  rng = np.random.default_rng(0)
  ranges = ((32, 127), (32, 1000), (0x3040, 0x30FF), (0x1F300, 0x1F6FF))
  texts = [
    ''.join(map(chr, rng.integers(*ranges[i % 4], rng.integers(0, 60))))
    for i in range(200)
  ]
  expected = theirs(
    texts, padding='max_length', max_length=77, truncation=True
  )['input_ids']
  np.testing.assert_array_equal(ours(texts), expected)
