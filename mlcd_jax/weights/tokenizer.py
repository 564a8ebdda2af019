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

# The tokens of a text and the size of the vocabulary in all of OpenAI's models.
CONTEXT = 77
VOCAB_SIZE = 49_408
START, END = '<|startoftext|>', '<|endoftext|>'

_BYTES = 256  # The number of values of a byte.
# Matches a mark, an English contraction, a run of letters, a single digit or a
# run of other signs, as in CLIP's simple_tokenizer.py.
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
  r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+'
)


class Tokenizer:
  """A function from texts to token ids.

  Attributes:
    context: L, the length of every row of ids.
    vocab_size: the number of ids.
  """

  def __init__(self, bpe: tokenizers.Tokenizer, context: int):
    """Sets the padding and truncation of a tokenizer.

    Args:
      bpe: a tokenizer that puts START before and END after a text.
      context: L, the length of every row of ids.

    Raises:
      UserError: the tokenizer does not know END.
    """
    self.context = context
    self.vocab_size = bpe.get_vocab_size()
    end = bpe.token_to_id(END)
    if end is None:
      raise errors.UserError(
        f'the tokenizer has no {END!r}, which a text of CLIP ends with'
      )
    # transformers pads CLIP's texts with END; ids after the first END have no
    # effect.
    bpe.enable_padding(length=context, pad_id=end, pad_token=END)
    bpe.enable_truncation(context)
    self._bpe = bpe

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the ids of texts, int32 [B, L].

    A row holds the start, the text, the end and padding. Long texts are cut so
    that the end still fits.
    """
    found = self._bpe.encode_batch(list(texts))
    ids = np.array([e.ids for e in found], np.int32)
    return ids.reshape(len(texts), self.context)

  def save(self, path: pathlib.Path) -> None:
    """Writes the tokenizer to a tokenizer.json that `transformers` reads."""
    self._bpe.save(str(path))


def clip(context: int = CONTEXT) -> Tokenizer:
  """Makes CLIP's own tokenizer from the vocabulary in this package.

  Args:
    context: L, the length of every row of ids.
  """
  file = importlib.resources.files('mlcd_jax') / 'assets/clip_bpe.txt.gz'
  lines = gzip.decompress(file.read_bytes()).decode().splitlines()
  # The first line is a heading. CLIP uses only as many merges as its vocabulary
  # has room for, besides the letters and the two marks below.
  count = VOCAB_SIZE - 2 * _BYTES - 2
  merges = [tuple(line.split()) for line in lines[1 : count + 1]]
  # The order fixes the ids: a letter for each byte, the same letters at the end
  # of a word, the results of the merges, and the two marks.
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
  """Loads the tokenizer of a checkpoint.

  A checkpoint without tokenizer.json gets CLIP's own tokenizer if both have
  vocabularies of the same size.

  Args:
    folder: a folder as `transformers` writes it.
    context: L, the most tokens that the text tower takes.
    vocab_size: the number of ids that the text tower knows.

  Raises:
    UserError: the file is missing and CLIP's vocabulary does not fit, the file
      is damaged, or it has more ids than the text tower knows.
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
