"""CLIP's byte-pair encoding (Radford et al. 2021), by the tokenizers package.

Shapes: B texts, L tokens.
"""

from collections.abc import Sequence
import gzip
import importlib.resources
import pathlib

import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from mlcd_jax.runtime import errors

CONTEXT = 77
VOCAB_SIZE = 49_408
START, END = '<|startoftext|>', '<|endoftext|>'

_BYTES = 256
# A letter run, one digit, a run of other signs, or an English contraction.
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+'
)


class Tokenizer:
  """Texts to token ids.

  Attributes:
    context: L.
    vocab_size: number of ids.
  """

  def __init__(self, bpe: tokenizers.Tokenizer, context: int):
    """Takes a tokenizer that puts start and end around a text."""
    self.context = context
    self.vocab_size = bpe.get_vocab_size()
    end = bpe.token_to_id(END)
    if end is None:
      raise errors.UserError(
        f'the tokenizer has no {END!r}, which a text of CLIP ends with'
      )
    bpe.enable_padding(length=context, pad_id=end, pad_token=END)
    bpe.enable_truncation(context)
    self._bpe = bpe

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns ids int32 [B, L]: start, the text cut to fit, end, padding."""
    found = self._bpe.encode_batch(list(texts))
    ids = np.array([e.ids for e in found], np.int32)
    return ids.reshape(len(texts), self.context)

  def save(self, path: pathlib.Path) -> None:
    """Writes it as `transformers` keeps it, tokenizer.json."""
    self._bpe.save(str(path))


def clip(context: int = CONTEXT) -> Tokenizer:
  """The vocabulary of all CLIP models, which lies in the package."""
  file = importlib.resources.files('mlcd_jax') / 'assets/clip_bpe.txt.gz'
  lines = gzip.decompress(file.read_bytes()).decode().splitlines()
  # The file has more merges than CLIP uses; its first line is a heading.
  count = VOCAB_SIZE - 2 * _BYTES - 2
  merges = [tuple(line.split()) for line in lines[1 : count + 1]]
  # A byte's letter, the same at a word's end, what they merge to, two marks.
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = letters + [letter + '</w>' for letter in letters]
  words += [''.join(merge) for merge in merges] + [START, END]
  vocab = {word: i for i, word in enumerate(words)}
  bpe = tokenizers.Tokenizer(
    models.BPE(vocab, merges, end_of_word_suffix='</w>', unk_token=END)
  )
  bpe.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      normalizers.Lowercase(),
    ]
  )
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(_WORDS), behavior='removed', invert=True
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  bpe.post_processor = processors.RobertaProcessing(
    (END, vocab[END]), (START, vocab[START]), False, False
  )
  bpe.add_special_tokens([START, END])
  return Tokenizer(bpe, context)


def load(folder: pathlib.Path, context: int, vocab_size: int) -> Tokenizer:
  """The tokenizer of a checkpoint: its own, or CLIP's where that fits.

  Args:
    folder: as `transformers` writes it.
    context: tokens of the longest text.
    vocab_size: ids the text tower knows.

  Raises:
    UserError: it has none and its tower has another vocabulary than CLIP's,
      or it has one that the tower does not know.
  """
  path = folder / 'tokenizer.json'
  if path.is_file():
    try:
      own = Tokenizer(tokenizers.Tokenizer.from_file(str(path)), context)
    except Exception as e:  # The package raises plain exceptions.
      raise errors.UserError(
        f'{path}: cannot be read ({e}); get it again'
      ) from e
  elif vocab_size == VOCAB_SIZE:
    own = clip(context)
  else:
    raise errors.UserError(
      f'{path}: missing, and a vocabulary of {vocab_size} is not the '
      f"{VOCAB_SIZE} of CLIP's own; save the tokenizer beside the weights"
    )
  if own.vocab_size > vocab_size:
    raise errors.UserError(
      f'{path}: has {own.vocab_size} tokens, the text tower {vocab_size}'
    )
  return own
