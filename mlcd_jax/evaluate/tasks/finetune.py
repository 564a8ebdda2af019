"""Fine-tuning of the whole encoder, with layer-wise learning-rate decay.

AdamW on the cross-entropy of a linear head on the pooled features; a layer's
learning rate is that of the layer above times evaluate.finetune_layer_decay
(BEiT: Bao et al. 2021, appendix; MAE: He et al. 2021, A.1). A ResNet's running
averages stay as they are.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mlcd_jax import optimizer
from mlcd_jax import sharding
from mlcd_jax.data import pipelines
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import scores
from mlcd_jax.runtime import progress as progress_lib

_WEIGHT_DECAY = 0.05
_WARMUP = 0.1  # Of the steps.
_BLOCK = re.compile(r'encoder/block_(\d+)/')
_FIRST = re.compile(
  r'encoder/(patches|positions|class_|registers|pre_norm|stem)'
)


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns test accuracy; nothing for features that no model makes."""
  model = data.encoder and data.encoder.model
  if model is None or data.num_classes == 0:
    return {}
  params = _train(data, config)
  encoder = encoders.from_model(
    model,
    params['encoder'],
    data.mesh,
    prepare=data.encoder.prepare,
    image_size=data.encoder.image_size,
  )
  extract = features.Extractor(encoder, 'tuned', config.evaluate.batch_size)
  test = extract(data.test.source, 'test')
  head = jax.device_get(params['head'])
  logits_MC = test.features @ head['kernel'] + head['bias']
  right = scores.right(logits_MC, test.labels)
  values = intervals.bootstrap(right, seed=config.seed)
  return {f'accuracy{k}': v for k, v in values.items()}


def layer_scales(params, depth: int, decay: float):
  """The factor of every parameter's learning rate.

  Args:
    params: {'encoder': ..., 'head': ...}.
    depth: blocks of the encoder.
    decay: d. Head, last norm and pooling have 1, block i of n has d^(n - i),
      patches, positions and tokens, or the stem, d^(n + 1).
  """

  def scale(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    block = _BLOCK.search(name)
    if block:
      return decay ** (depth - int(block[1]))
    if _FIRST.match(name):
      return decay ** (depth + 1)
    return 1.0

  return jax.tree_util.tree_map_with_path(scale, params)


def _train(data: features.Data, config: ml_collections.ConfigDict):
  """The encoder's parameters and the head's after fine-tuning."""
  c, model = config.evaluate, data.encoder.model
  steps = max(
    1, round(c.finetune_epochs * len(data.train) / c.finetune_batch_size)
  )
  width = data.train.features.shape[1]
  params = {
    'encoder': data.encoder.params,
    'head': {
      'kernel': jnp.zeros((width, data.num_classes)),
      'bias': jnp.zeros(data.num_classes),
    },
  }
  start, step = _program(
    model, steps, c.finetune_learning_rate, c.finetune_layer_decay
  )
  state = start(params)
  progress = progress_lib.Progress('finetune', steps, unit='steps')
  for i, batch in zip(range(steps), _batches(data, config)):
    params, state = step(params, state, sharding.put_batch(data.mesh, batch))
    progress.update(i + 1)
  return params


@functools.cache  # The next encoder of the model is not compiled again.
def _program(model: Any, steps: int, learning_rate: float, decay: float):
  """Makes params -> state, and (params, state, batch) -> both after a step."""
  warmup = max(1, round(_WARMUP * steps))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warmup, max(steps, warmup + 1)
  )
  tx = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(_WEIGHT_DECAY, mask=optimizer.decayed),
    optax.scale_by_learning_rate(schedule),
  )

  def loss(params, batch):
    out = model.apply({'params': params['encoder']}, batch['image'])
    head = params['head']
    logits_BC = out['pooled'] @ head['kernel'] + head['bias'][None]
    label_B = batch['labels'][:, 0]
    loss_B = optax.softmax_cross_entropy_with_integer_labels(
      logits_BC, jnp.maximum(label_B, 0)
    )
    weight_B = batch['weight'] * (label_B >= 0)
    return jnp.sum(loss_B * weight_B) / jnp.maximum(jnp.sum(weight_B), 1)

  @jax.jit
  def step(params, state, batch):
    gradients = jax.grad(loss)(params, batch)
    updates, state = tx.update(gradients, state, params)
    scales = layer_scales(params, model.depth, decay)
    updates = jax.tree.map(jnp.multiply, updates, scales)
    return optax.apply_updates(params, updates), state

  return tx.init, step


def _batches(data: features.Data, config: ml_collections.ConfigDict):
  """Random crops of the training images with their classes."""
  rows = np.full(len(data.train.source), -1, np.int64)
  rows[data.train.records] = np.arange(len(data.train))
  return pipelines.train_batches(
    data.train.source,
    rows,
    data.train.labels[:, None],
    num_positives=1,
    batch_size=config.evaluate.finetune_batch_size,
    image_size=data.encoder.image_size,
    crop_area=tuple(config.data.crop_area),
    flip=config.data.flip,
    seed=config.seed,
    num_workers=config.data.num_workers,
    rows=sharding.own_rows(data.mesh, config.evaluate.finetune_batch_size),
  )
