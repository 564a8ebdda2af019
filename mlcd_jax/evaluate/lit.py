"""Text towers for frozen image encoders: the encoder's own, or one tuned to it.

Tuning is locked-image tuning (LiT, Zhai et al. 2022): the features of captioned
images are extracted once, and a text tower is trained to match them. Unlike
LiT, the mean of the captioned images is subtracted from all features. A large
common mean would bring all cosines close to 1.

Shapes: B pairs, N images, M texts, L tokens, D features, E joint embedding.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import numpy as np
import optax

from mlcd_jax import optimizer
from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.evaluate import contrastive
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.models import text
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import progress as progress_lib
from mlcd_jax.weights import text as huggingface_text
from mlcd_jax.weights import tokenizer

_log = logging.getLogger(__name__)

# The initial (scale, bias) of each loss. CLIP (Radford et al. 2021, section
# 2.5) starts at a temperature of 0.07 and clips the scale at 100. SigLIP (Zhai
# et al. 2023, section 3.2) starts at 10 and -10, since most pairs are negative.
_FIRST = {'softmax': (1 / 0.07, 0.0), 'sigmoid': (10.0, -10.0)}
_LARGEST_SCALE = 100.0

# The width of an attention head, as in CLIP.
_HEAD_WIDTH = 64
# Texts that a device encodes at a time. All calls have this one shape, so that
# the tower is compiled once.
_TEXTS_PER_DEVICE = 64
# Records that `check` reads to find a caption. It runs before the first stage,
# so it must be quick.
_LOOKED_AT = 100


@dataclasses.dataclass(frozen=True)
class Towers:
  """Two functions that map images and texts into one embedding space.

  Attributes:
    images: a function from the encoder's features float32 [N, D] to unit rows
      [N, E].
    texts: a function from M texts to unit rows [M, E].
  """

  images: Callable[[np.ndarray], np.ndarray]
  texts: Callable[[Sequence[str]], np.ndarray]


def towers(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> Towers | None:
  """Returns the towers of an encoder, made at the first call for it.

  Args:
    data: the data of the task; its `shared` keeps the towers for other tasks.
    config: the config of the run.

  Returns:
    The towers, or None if the encoder has no text tower of its own and
    lit.steps=0 forbids tuning one.
  """
  if 'towers' not in data.shared:
    made = None
    if data.encoder.text_path:
      made = _released(data)
    elif config.lit.steps:
      made = _tuned(data, config)
    else:
      _log.warning('evaluate: no text tower, and lit.steps=0 tunes none')
    data.shared['towers'] = made
  return data.shared['towers']


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if the first images of `data` have no captions."""
  source = sources.make(config.data)
  told = [source[i]['caption'] for i in range(min(_LOOKED_AT, len(source)))]
  if not any(found.strip() for found in told):
    raise errors.UserError(
      f'data.caption_key={config.data.caption_key}: no captions there, on '
      'which evaluate.tasks zero_shot and retrieval tune a text tower; name '
      'the key that has them, or set lit.steps=0'
    )


def captions(split: features_lib.Split) -> list[list[str]]:
  """Returns the captions of every image.

  A source gives all captions of an image in one string, one on each line.
  """
  return [
    [line.strip() for line in found.splitlines() if line.strip()]
    for found in split.values('caption')
  ]


def _released(data: features_lib.Data) -> Towers:
  """Returns the towers of a CLIP checkpoint, without any training."""
  path, field = data.encoder.text_path, 'evaluate.encoder'
  model, variables = huggingface_text.load(path, field=field)
  words = huggingface_text.load_tokenizer(path, model, field=field)
  projection = np.asarray(data.encoder.params['projection']['kernel'])
  return Towers(
    lambda rows: unit.unit_rows(rows @ projection),
    _text_encoder(model, variables['params'], words, data.mesh),
  )


def _tuned(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> Towers:
  """Trains a text tower on the images and captions of config.data."""
  split = data.extract(sources.make(config.data), 'captions')
  told = captions(split)
  rows = np.flatnonzero([len(found) > 0 for found in told])
  mean = split.features[rows].mean(axis=0)
  model, words = _make_tower(config.lit, split.features.shape[1])
  params = train(
    model,
    words,
    unit.unit_rows(split.features[rows] - mean),
    [told[row] for row in rows],
    config=config,
    mesh=data.mesh,
  )
  return Towers(
    lambda rows: unit.unit_rows(rows - mean),
    _text_encoder(model, params, words, data.mesh),
  )


def _make_tower(
  config: ml_collections.ConfigDict, embedding_dim: int
) -> tuple[text.TextTower, tokenizer.Tokenizer]:
  """Makes CLIP's text tower and its tokenizer from the `lit` fields."""
  words = tokenizer.clip(config.context)
  model = text.TextTower(
    vocab_size=words.vocab_size,
    context=config.context,
    width=config.width,
    depth=config.depth,
    heads=max(1, config.width // _HEAD_WIDTH),
    mlp_dim=4 * config.width,
    embedding_dim=embedding_dim,
    dtype=jnp.dtype(config.dtype),
  )
  return model, words


def train(
  model: text.TextTower,
  words: tokenizer.Tokenizer,
  images_ND: np.ndarray,
  told: Sequence[Sequence[str]],
  *,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> dict[str, Any]:
  """Trains a text tower to match the features of captioned images.

  Args:
    model: the text tower.
    words: the tokenizer of the tower.
    images_ND: the features of the images, as unit rows.
    told: the captions of every image, at least one each. A step draws one of
      an image's captions.
    config: the config of the run. It uses `lit`, and `optimizer` except for
      the learning rate, which is lit.learning_rate.
    mesh: the mesh whose devices split a batch.

  Returns:
    The parameters of the tower, on every device.

  Raises:
    UserError: lit.batch_size is not divisible by the number of devices.
  """
  if config.lit.batch_size % mesh.size:
    raise errors.UserError(
      f'lit.batch_size={config.lit.batch_size} is not divisible by the '
      f'{mesh.size} devices'
    )
  scale, bias = _FIRST[config.lit.loss]
  tokens = words([''])
  params = {
    'tower': model.init(jax.random.key(config.seed), tokens)['params'],
    'log_scale': jnp.float32(math.log(scale)),
    'bias': jnp.float32(bias),
  }
  params = sharding.put(mesh, sharding.REPLICATED, jax.device_get(params))
  step, state = _make_step(model, params, config, mesh)
  own = sharding.own_rows(mesh, config.lit.batch_size)
  progress = progress_lib.Progress('text tower', config.lit.steps, unit='steps')
  for i in range(config.lit.steps):
    rows = _rows_of(i, len(images_ND), config)[own]
    # Drawn for the global batch, so that it is the same on any number of hosts.
    rng = np.random.default_rng((config.seed, i))
    chosen = rng.integers(0, 2**31, config.lit.batch_size)[own]
    texts = [told[row][n % len(told[row])] for row, n in zip(rows, chosen)]
    batch = {'images': images_ND[rows], 'tokens': words(texts)}
    state, loss = step(state, sharding.put_batch(mesh, batch))
    if (i + 1) % config.train.log_every_steps == 0 or i + 1 == config.lit.steps:
      progress.update(i + 1, loss=float(loss))
  return state[0]['tower']


def _rows_of(
  step: int, num_pairs: int, config: ml_collections.ConfigDict
) -> np.ndarray:
  """Returns the rows of a step's global batch.

  Each epoch takes every row once, in a new order. A batch may reach into the
  next epoch.
  """
  first = step * config.lit.batch_size
  return np.array(
    [
      pipelines.record_at(place, num_pairs, config.seed)
      for place in range(first, first + config.lit.batch_size)
    ]
  )


def _make_step(model, params, config, mesh):
  """Returns a function (state, batch) -> (state, loss), and the first state."""
  fields = config.optimizer.copy_and_resolve_references()
  # The multipliers and the sparse update are for the train stage's parameters,
  # which a text tower does not have.
  fields.update(
    learning_rate=config.lit.learning_rate, multipliers=(), head_update='dense'
  )
  fields = ml_collections.FrozenConfigDict(fields)
  start, step = _program(model, config.lit.loss, config.lit.steps, fields, mesh)
  return step, (params, start(params))


# Cached, so that the tower of the next encoder is not compiled again.
@functools.cache
def _program(model, loss_name, steps, fields, mesh):
  """Makes the functions params -> moments and (state, batch) -> (state, loss).

  A state is (params, moments of the optimizer). A batch has the unit rows
  `images` [B, D] and the `tokens` [B, L].
  """
  loss = contrastive.make(loss_name, mesh)
  tx = optimizer.make(fields, optimizer.make_schedule(fields, steps))

  def objective(params, batch):
    out = model.apply({'params': params['tower']}, batch['tokens'])
    log_scale = jnp.minimum(params['log_scale'], math.log(_LARGEST_SCALE))
    return loss(
      batch['images'],
      unit.unit_embeddings(out['embedding']),
      jnp.exp(log_scale),
      params['bias'],
    )

  def step(state, batch):
    params, moments = state
    value, gradients = jax.value_and_grad(objective)(params, batch)
    updates, moments = tx.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  everywhere = NamedSharding(mesh, sharding.REPLICATED)
  start = jax.jit(tx.init, out_shardings=everywhere)
  return start, jax.jit(step, donate_argnums=0, out_shardings=everywhere)


def _text_encoder(
  model: text.TextTower,
  params: Any,
  words: tokenizer.Tokenizer,
  mesh: Mesh,
) -> Callable[[Sequence[str]], np.ndarray]:
  """Makes a function from texts to unit rows, in padded batches of one shape.

  Args:
    model: the text tower.
    params: the parameters of the tower.
    words: the tokenizer of the tower.
    mesh: the mesh whose devices split a batch.
  """
  batch_size = _TEXTS_PER_DEVICE * mesh.size
  params = sharding.put(mesh, sharding.REPLICATED, jax.device_get(params))

  def texts(found: Sequence[str]) -> np.ndarray:
    rows = []
    for i in range(0, len(found), batch_size):
      part = list(found[i : i + batch_size])
      tokens = words(part + [''] * (batch_size - len(part)))
      tokens = sharding.put(mesh, sharding.BATCH, tokens)
      part_rows = sharding.to_host(_encode(params, tokens, model=model))
      rows.append(part_rows[: len(part)])
    return np.concatenate(rows)

  return texts


@functools.partial(jax.jit, static_argnames='model')
def _encode(params, tokens, *, model):
  """Returns the unit rows [M, E] of tokens [M, L]."""
  out = model.apply({'params': params}, tokens)
  return unit.unit_embeddings(out['embedding'])
