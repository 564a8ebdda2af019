"""Fine-tuning of the whole encoder, with layer-wise learning-rate decay.

AdamW minimises the cross-entropy of a linear head on the pooled features. The
learning rate of a layer is that of the layer above times
evaluate.finetune_layer_decay (BEiT: Bao et al. 2021, appendix; MAE: He et al.
2021, A.1). The running averages of a ResNet are not updated.

Shapes: B images, C classes, M test images.
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

_WEIGHT_DECAY = 0.05  # As in MAE, A.1.
_WARMUP = 0.1  # The share of the steps.
_BLOCK = re.compile(r'encoder/block_(\d+)/')
_FIRST = re.compile(
  r'encoder/(patches|positions|class_|registers|pre_norm|stem)'
)


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns the test accuracy after fine-tuning, with its interval.

  It returns {} if the features do not come from a model, such as raw pixels, or
  if the data set has no classes.
  """
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
  """Returns the factor of every parameter's learning rate.

  With n blocks and decay d, the head, the last norm and the pooling have the
  factor 1 and block i has d^(n - i). The patch embedding, the positions and the
  learned tokens have d^(n + 1), and so does the stem of a ResNet.

  Args:
    params: a tree {'encoder': ..., 'head': ...}.
    depth: n, the number of blocks of the encoder.
    decay: d, the factor from one block to the one below.
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
  """Fine-tunes the encoder with a new head; returns the parameters of both."""
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


# Cached, so that the next encoder of the same model is not compiled again.
@functools.cache
def _program(model: Any, steps: int, learning_rate: float, decay: float):
  """Makes the two functions of the fine-tuning.

  The first maps params to the state of the optimizer, the second (params,
  state, batch) to the params and the state after a step.
  """
  warmup = max(1, round(_WARMUP * steps))
  # optax needs at least one step after the warmup.
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
    # Images that do not decode or have no class do not count.
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
  """Yields batches of random crops of the training images, without end.

  A batch has `image` and `weight`, and the classes as `labels` [B, 1].
  """
  # The row of each record's label; records that failed to decode have none.
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
