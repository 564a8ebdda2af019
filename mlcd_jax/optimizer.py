"""AdamW, its schedules, and what its rules apply to.

Rules match a parameter's name, such as
encoder/block_00/attention/qkv/kernel or classifier/weight.
"""

import re

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mlcd_jax.runtime import errors

SCHEDULES = ('cosine', 'polynomial', 'constant')
HEAD_UPDATES = ('dense', 'sparse')

# Gains, biases, positions, learned tokens and running averages are not decayed.
_NOT_DECAYED = re.compile(
  r'(bias|scale|mean|variance|positions?|class_token|registers|probe)$'
)
_CLASSIFIER = re.compile(r'(^|/)classifier/weight$')

# OneVision-Encoder, training/train.py.
_POLYNOMIAL_POWER = 2


def make_schedule(
  config: ml_collections.ConfigDict, steps: int
) -> optax.Schedule:
  """Linear warmup to `learning_rate`, then a decay to zero at `steps`, or none.

  Args:
    config: the `optimizer` fields.
    steps: of the whole run, whatever this invocation does of it.
  """
  warmup = config.warmup_steps
  warmup = round(warmup * steps) if warmup < 1 else int(warmup)
  # A warmup longer than the run never reaches its decay.
  decay_steps = max(steps - warmup, 1)
  peak = config.learning_rate
  decay = {
    'cosine': lambda: optax.cosine_decay_schedule(peak, decay_steps),
    'polynomial': lambda: optax.polynomial_schedule(
      peak, 0.0, _POLYNOMIAL_POWER, decay_steps
    ),
    'constant': lambda: optax.constant_schedule(peak),
  }[config.schedule]()
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
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
  tx = optax.chain(
    _clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(b1=config.b1, b2=config.b2),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
    _scale_by_name(config),
    optax.scale_by_learning_rate(schedule),
  )
  return _sparse_classifier(tx) if config.head_update == 'sparse' else tx


def _clip_by_global_norm(norm: float) -> optax.GradientTransformation:
  """As optax's, by one factor.

  Optax divides every gradient by the norm. XLA does not repeat divisions, so
  that it would write the clipped gradients to memory and read them again.
  """

  def update(updates, state, params=None):
    del params
    factor = norm / jnp.maximum(optax.tree.norm(updates), norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by_name(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Multiplies each parameter's update by those rules' factors it matches."""
  rules = [(_CLASSIFIER.pattern, config.head_learning_rate_multiplier)]
  rules += [(pattern, factor) for pattern, factor in config.multipliers]

  def update(updates, state, params):
    del params
    names = jax.tree.leaves(_by_name(updates, lambda name: name))
    for pattern, _ in rules[1:]:
      if not any(re.search(pattern, name) for name in names):
        raise errors.UserError(
          f'optimizer.multipliers: {pattern!r} matches no parameter; they are '
          f'named as {names[-1]}'
        )

    def scale(name):
      factor = 1.0
      for pattern, value in rules:
        factor *= value if re.search(pattern, name) else 1.0
      return factor

    return jax.tree.map(jnp.multiply, updates, _by_name(updates, scale)), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _sparse_classifier(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Leaves classes without a gradient, and their moments, as they are.

  Those are the classes that were neither drawn nor a positive in the step;
  otherwise they would decay and go on with their momentum.
  """

  def update(gradients, state, params):
    weight_CD = gradients['classifier']['weight']
    touched_C1 = jnp.any(weight_CD != 0, axis=1, keepdims=True)
    updates, new_state = tx.update(gradients, state, params)

    def keep(path, new, old):
      if _CLASSIFIER.search(_name(path)):
        return jnp.where(touched_C1, new, old)
      return new

    updates = jax.tree_util.tree_map_with_path(
      lambda path, x: keep(path, x, jnp.zeros_like(x)), updates
    )
    return updates, jax.tree_util.tree_map_with_path(keep, new_state, state)

  return optax.GradientTransformation(tx.init, update)


def decayed(params):
  """Which parameters of a tree are decayed, by name."""
  return _by_name(params, lambda name: not _NOT_DECAYED.search(name))


def _by_name(params, rule):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(_name(path)), params
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
