"""AdamW, its learning-rate schedules and its rules by parameter name.

A rule is a regular expression that is searched for in the name of a parameter,
such as encoder/block_00/attention/qkv/kernel or classifier/weight.
"""

import re

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mlcd_jax.runtime import errors

# AdamW's usual exceptions: gains, biases, positions and learned tokens. Running
# averages are no weights at all; batch_norm.follow alone may move them.
_NOT_DECAYED = re.compile(
  r'(bias|scale|mean|variance|positions?|class_token|registers|probe)$'
)
_CLASSIFIER = re.compile(r'(^|/)classifier/weight$')

# The power in the authors' code (OneVision-Encoder, training/train.py).
_POLYNOMIAL_POWER = 2


def make_schedule(
  config: ml_collections.ConfigDict, steps: int
) -> optax.Schedule:
  """Makes the learning-rate schedule: linear warmup, then the chosen decay.

  The warmup ends at `learning_rate`. The cosine and polynomial schedules reach
  zero at `steps`.

  Args:
    config: the `optimizer` fields.
    steps: the steps of the whole run, even if this invocation does fewer.
  """
  warmup = config.warmup_steps
  # A value below 1 is a share of the run.
  warmup = round(warmup * steps) if warmup < 1 else int(warmup)
  # optax needs a positive length even if the warmup outlasts the run.
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
  """Makes the optimizer for the encoder and the classifier.

  Args:
    config: the `optimizer` fields.
    schedule: the function from step to learning rate.
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
  """Clips like optax.clip_by_global_norm, but multiplies by a single factor.

  Optax divides every gradient by the norm. XLA does not duplicate divisions
  when it fuses, so it would write the clipped gradients to memory and read
  them back.
  """

  def update(updates, state, params=None):
    del params
    factor = norm / jnp.maximum(optax.tree.norm(updates), norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by_name(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """Scales each update by the product of the factors of all matching rules.

  Raises:
    UserError: a pattern of `multipliers` matches no parameter. The first
      update raises it, when it is traced.
  """
  rules = [(_CLASSIFIER.pattern, config.head_learning_rate_multiplier)]
  rules += [(pattern, factor) for pattern, factor in config.multipliers]

  def update(updates, state, params):
    del params
    names = jax.tree.leaves(_by_name(updates, lambda name: name))
    # The first rule is the built-in one; a typo can only be in the others.
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
  """Leaves class centers with a zero gradient, and their moments, unchanged.

  A center has a zero gradient if its class was neither drawn nor a positive in
  the step. AdamW alone would still decay it and apply its momentum.
  """

  def update(gradients, state, params):
    weight_CD = gradients['classifier']['weight']
    touched_C1 = jnp.any(weight_CD != 0, axis=1, keepdims=True)
    updates, new_state = tx.update(gradients, state, params)

    # The moments of the classifier have paths that end like its weight's.
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
  """Returns a tree of bools like `params`: True where weight decay applies."""
  return _by_name(params, lambda name: not _NOT_DECAYED.search(name))


def _by_name(params, rule):
  """Returns a tree like `params` with rule(name) for every parameter."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(_name(path)), params
  )


def _name(path) -> str:
  """Returns the name of a parameter, its path joined with slashes."""
  return jax.tree_util.keystr(path, simple=True, separator='/')
