"""Loads the text tower of a CLIP checkpoint that `transformers` wrote."""

import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mlcd_jax.models import text
from mlcd_jax.runtime import errors
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import layouts
from mlcd_jax.weights import tensors
from mlcd_jax.weights import tokenizer

# The values of fields that config.json leaves out, as in transformers 5.23.
_DEFAULTS = dict(
  vocab_size=tokenizer.VOCAB_SIZE,
  hidden_size=512,
  intermediate_size=2_048,
  num_hidden_layers=12,
  num_attention_heads=8,
  max_position_embeddings=tokenizer.CONTEXT,
  hidden_act='quick_gelu',
  layer_norm_eps=1e-5,
  eos_token_id=tokenizer.VOCAB_SIZE - 1,
)
_TYPES = ('clip', 'clip_text_model')

# Older versions of transformers wrote this eos_token_id by mistake. Models with
# it pool at the highest id of a text, as transformers does for them.
_WRONG_END = 2


def load(
  path: str | pathlib.Path, *, dtype: str = 'float32', field: str = 'path'
) -> tuple[text.TextTower, dict[str, Any]]:
  """Loads the text tower of a CLIP checkpoint.

  Args:
    path: a folder as `transformers` writes it, or ORG/NAME[@REVISION].
    dtype: the type of the operands of products; the weights are float32.
    field: the name of the config field, for errors.

  Returns:
    The model and its variables, for model.apply(variables, tokens).

  Raises:
    UserError: the checkpoint has no text tower of CLIP, or is incomplete.
  """
  folder = hub.resolve(str(path), field)
  config = _config(folder)
  reader = tensors.Reader(folder, text=True)
  projected = layouts.TEXT_PROJECTION in reader.names()
  end = config['eos_token_id']
  model = text.TextTower(
    vocab_size=config['vocab_size'],
    context=config['max_position_embeddings'],
    width=config['hidden_size'],
    depth=config['num_hidden_layers'],
    heads=config['num_attention_heads'],
    mlp_dim=config['intermediate_size'],
    embedding_dim=(
      reader.shape(layouts.TEXT_PROJECTION)[0] if projected else 0
    ),
    dtype=jnp.dtype(dtype),
    end_token=-1 if end == _WRONG_END else end,
    activation=configs.ACTIVATIONS[config['hidden_act']],
    norm_epsilon=config['layer_norm_eps'],
  )
  table = layouts.of_text(model)
  params = tensors.read(reader, table, _shapes(model), folder)
  return model, {'params': params}


def load_tokenizer(
  path: str | pathlib.Path, model: text.TextTower, *, field: str = 'path'
) -> tokenizer.Tokenizer:
  """Loads the tokenizer of a text tower.

  Args:
    path: a folder as `transformers` writes it, or ORG/NAME[@REVISION].
    model: the text tower, whose context and vocabulary the tokenizer must fit.
    field: the name of the config field, for errors.

  Raises:
    UserError: the checkpoint has no tokenizer that fits; see `tokenizer.load`.
  """
  folder = hub.resolve(str(path), field)
  return tokenizer.load(folder, model.context, model.vocab_size)


def is_there(path: str | pathlib.Path, field: str = 'path') -> bool:
  """Returns whether a checkpoint has both of CLIP's towers with projections.

  Args:
    path: a folder as `transformers` writes it, or ORG/NAME[@REVISION].
    field: the name of the config field, for errors.
  """
  folder = hub.resolve(str(path), field)
  if configs.read(folder)[0] != 'clip':
    return False
  images, texts = (tensors.Reader(folder, text=text) for text in (False, True))
  return (
    layouts.PROJECTION in images.names()
    and layouts.TEXT_PROJECTION in texts.names()
  )


def _config(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of the text tower, with defaults filled in.

  Raises:
    UserError: the config has no text tower of CLIP, or a field is wrong.
  """
  path = folder / 'config.json'
  config = configs.read_json(path)
  if config.get('model_type') not in _TYPES:
    raise errors.UserError(
      f'{path}: model_type={config.get("model_type")!r} has no text tower '
      'that is known here; use one of: ' + ', '.join(_TYPES)
    )
  config = configs.tower(path, config, 'text', _DEFAULTS)
  configs.check_sizes(path, config)
  if type(config['eos_token_id']) is not int:
    raise errors.UserError(
      f'{path}: eos_token_id={config["eos_token_id"]!r} is no whole number'
    )
  return config


def _shapes(model: text.TextTower) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by path, without making any."""
  abstract = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, model.context), jnp.int32),
  )
  flat = flax.traverse_util.flatten_dict(abstract['params'], sep='/')
  return {path: x.shape for path, x in flat.items()}
