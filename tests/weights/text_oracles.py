"""Tiny random text towers of CLIP in transformers, and what they say.

  python tests/weights/text_oracles.py

writes tests/text_goldens anew: folders as transformers writes them, each with
golden.npz, and what its tokenizer makes of TEXTS. Needs torch and transformers.
"""

import json
import pathlib
import shutil

import numpy as np

GOLDENS = pathlib.Path(__file__).parent.parent / 'text_goldens'

_TEXT = dict(
  hidden_size=20,
  intermediate_size=28,
  num_hidden_layers=2,
  num_attention_heads=4,
  vocab_size=40,
  max_position_embeddings=9,
  projection_dim=6,
)
_VISION = dict(
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  image_size=14,
  patch_size=7,
)

# Name -> (class, fields of the text config).
MODELS = {
  'old_end': ('CLIPTextModelWithProjection', dict(eos_token_id=2)),
  'new_end': (
    'CLIPTextModelWithProjection',
    dict(eos_token_id=30, hidden_act='gelu', layer_norm_eps=1e-4),
  ),
  'both_towers': ('CLIPModel', dict(eos_token_id=39, num_hidden_layers=1)),
}

TEXTS = (
  'a photo of a cat',
  '',
  '   ',
  "  They'LL   say\tit's\nfine; don't they?!  ",
  'ÀÉÎ naïve café, the same: cafe\u0301',
  '12345 3.14 № ½ ² 日本語のテキスト 한국어 עברית',
  '🎉👩‍👩‍👧 emoji 🏳️‍🌈!',
  '<|startoftext|> and <|endoftext|> inside',
  '&amp; <b>html</b> stays #as @it_is',
  'word ' * 200,
  'antidisestablishmentarianism' * 20,
)


def make(name: str, seed: int = 0, **fields):
  """One of MODELS with random weights, none of them zero or one."""
  import torch
  import transformers

  class_name, own = MODELS[name]
  config = _TEXT | own | fields
  torch.manual_seed(seed)
  if class_name == 'CLIPModel':
    config = transformers.CLIPConfig(
      text_config=config,
      vision_config=_VISION,
      projection_dim=config['projection_dim'],
    )
  else:
    config = transformers.CLIPTextConfig(**config)
  model = getattr(transformers, class_name)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def tokens(model, length: int, seed: int = 0) -> np.ndarray:
  """Random ids [5, length] with the end somewhere and anything after it."""
  config = model.config
  config = getattr(config, 'text_config', config)
  vocab, end = config.vocab_size, config.eos_token_id
  rng = np.random.default_rng(seed)
  ids = rng.integers(3, vocab - 1, (5, length))
  if end == 2:  # The end meant by the old rule is the last of all.
    end = vocab - 1
  else:
    ids[ids == end] = 1
  ids[np.arange(5), rng.integers(1, length, 5)] = end
  return ids


def outputs(model, ids: np.ndarray) -> dict[str, np.ndarray]:
  """What a model makes of ids."""
  import torch

  ids = torch.tensor(ids)
  with torch.no_grad():
    out = model.text_model(ids)
    found = {
      'tokens': out.last_hidden_state,
      'pooled': out.pooler_output,
      'embedding': model.text_projection(out.pooler_output),
    }
  return {k: v.numpy() for k, v in found.items()}


def clip_tokenizer():
  """Transformers' tokenizer with the vocabulary that lies in the package."""
  import gzip

  import transformers

  path = pathlib.Path(__file__).parents[2] / 'mlcd_jax/assets/clip_bpe.txt.gz'
  lines = gzip.decompress(path.read_bytes()).decode().splitlines()
  merges = [tuple(line.split()) for line in lines[1 : 49_152 - 256 - 2 + 1]]
  signs = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters = [chr(c) for c in signs] + [chr(c) for c in range(256, 256 + 68)]
  words = letters + [letter + '</w>' for letter in letters]
  words += [''.join(m) for m in merges] + ['<|startoftext|>', '<|endoftext|>']
  return transformers.CLIPTokenizer(
    vocab={word: i for i, word in enumerate(words)}, merges=merges
  )


def main() -> None:
  """Writes the goldens anew."""
  shutil.rmtree(GOLDENS, ignore_errors=True)
  for name in MODELS:
    model = make(name)
    model.save_pretrained(GOLDENS / name)
    golden = {}
    for i, length in enumerate((9, 6, 4)):
      golden[f'{i}/ids'] = tokens(model, length, seed=i).astype(np.int32)
      for key, value in outputs(model, golden[f'{i}/ids']).items():
        golden[f'{i}/{key}'] = value
    np.savez_compressed(GOLDENS / name / 'golden.npz', **golden)
  encoded = clip_tokenizer()(
    list(TEXTS), padding='max_length', max_length=77, truncation=True
  )
  (GOLDENS / 'tokens.json').write_text(
    json.dumps(dict(zip(TEXTS, encoded['input_ids'])), indent=0)
  )


if __name__ == '__main__':
  main()
