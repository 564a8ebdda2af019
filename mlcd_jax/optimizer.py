"""AdamW with warmup and cosine decay, and what its rules apply to."""

import re

import jax
import ml_collections
import optax

# Gains, biases and embeddings of positions are not decayed.
_NOT_DECAYED = re.compile(r'(bias|scale|positions|class_token)$')
_CLASSIFIER = re.compile(r'^classifier/')


def make_schedule(
  config: ml_collections.ConfigDict, steps: int
) -> optax.Schedule:
  """Linear warmup to `learning_rate`, then a cosine to zero at `steps`.

  Args:
    config: the `optimizer` fields.
    steps: of the whole run, whatever this invocation does of it.
  """
  warmup = config.warmup_steps
  warmup = round(warmup * steps) if warmup < 1 else int(warmup)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    # A warmup longer than the run never reaches its decay.
    decay_steps=max(steps, warmup + 1),
  )


def make(
  config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Makes the optimizer of all parameters, encoder and classifier.

  Args:
    config: the `optimizer` fields.
    schedule: step -> learning rate.
  """
  clip = config.gradient_clip_norm
  head = config.head_learning_rate_multiplier
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(b1=config.b1, b2=config.b2),
    optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    optax.masked(optax.scale(head), _is_classifier),
    optax.scale_by_learning_rate(schedule),
  )


def _decayed(params):
  return _by_name(params, lambda name: not _NOT_DECAYED.search(name))


def _is_classifier(params):
  return _by_name(params, lambda name: bool(_CLASSIFIER.search(name)))


def _by_name(params, rule):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(
      jax.tree_util.keystr(path, simple=True, separator='/')
    ),
    params,
  )
