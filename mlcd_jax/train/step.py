"""The train state and the jitted training step.

Shapes: B images, L labels in a batch, P positives the loss uses.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import optax

from mlcd_jax import models
from mlcd_jax import optimizer
from mlcd_jax import sharding
from mlcd_jax.models import batch_norm
from mlcd_jax.train import classifier

# The weight of a step's loss in the moving average that spikes are compared
# with. 0.01 averages over the last hundred steps or so.
_LOSS_RATE = 0.01


@flax.struct.dataclass
class TrainState:
  """The state of training, as a checkpoint holds it.

  Attributes:
    step: int32 scalar, the number of steps taken.
    params: {"encoder": ..., "classifier": {"weight"}}, float32. The encoder of
      a ResNet includes its running averages.
    opt_state: the state of the optax optimizer.
    ema: the moving average of params["encoder"]; {} if train.ema_decay is 0.
    loss_average: float32 scalar, the moving average of the loss, infinite
      before the first step; {} if train.max_loss_ratio is 0.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: Any
  ema: dict[str, Any]
  loss_average: Any

  @property
  def encoder(self) -> dict[str, Any]:
    """Returns the encoder's parameters to use.

    These are the moving average if there is one.
    """
    return self.ema or self.params['encoder']


@dataclasses.dataclass(frozen=True)
class Program:
  """The jitted functions of training; making one allocates no array.

  Attributes:
    config: the whole config.
    num_classes: the number of classes without padding.
    steps: the number of steps of the whole run.
    mesh: the mesh of all devices.
  """

  config: ml_collections.ConfigDict
  num_classes: int
  steps: int
  mesh: Mesh

  @functools.cached_property
  def model(self):
    """Returns the encoder."""
    return models.make(self.config.model)

  @functools.cached_property
  def _sharded_model(self):
    """Returns the encoder for batches that lie on all devices."""
    batch = NamedSharding(self.mesh, sharding.BATCH)
    return models.make(self.config.model, batch)

  @functools.cached_property
  def schedule(self) -> optax.Schedule:
    """Returns the function from the number of a step to its learning rate."""
    return optimizer.make_schedule(self.config.optimizer, self.steps)

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Returns the shapes, types and shardings of the state.

    Raises:
      UserError: the mesh has too many devices for the classes.
    """
    classifier.check_devices(self.num_classes, self.mesh.size)
    shapes = jax.eval_shape(self._init)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.state_shardings(self.mesh, shapes),
    )

  @property
  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, types and shardings of a batch."""
    batch = NamedSharding(self.mesh, sharding.BATCH)
    size, images = self.config.model.image_size, self.config.train.batch_size
    return {
      name: jax.ShapeDtypeStruct((images, *shape), dtype, sharding=batch)
      for name, shape, dtype in (
        ('image', (size, size, 3), jnp.uint8),
        ('labels', (num_labels(self.config),), jnp.int32),
        ('weight', (), jnp.float32),
      )
    }

  def init(self) -> TrainState:
    """Makes the state of step 0.

    Only the padding of the class centers depends on the mesh.
    """
    return jax.jit(self._init, out_shardings=self._shardings)()

  def init_encoder(self) -> dict[str, Any]:
    """Makes only the encoder's parameters of step 0."""
    return jax.jit(
      self._init_encoder, out_shardings=self._shardings.params['encoder']
    )()

  @functools.cached_property
  def step(self):
    """Returns the jitted function (state, batch) -> (state, metrics).

    It donates the state: the arrays of the old state are deleted.
    """
    replicated = NamedSharding(self.mesh, sharding.REPLICATED)
    batch = NamedSharding(self.mesh, sharding.BATCH)
    return jax.jit(
      self._step,
      in_shardings=(self._shardings, batch),
      out_shardings=(self._shardings, replicated),
      donate_argnums=0,
    )

  @property
  def _shardings(self):
    """Returns the shardings of the state."""
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  @functools.cached_property
  def _optimizer(self) -> optax.GradientTransformation:
    """Returns the optimizer of all parameters."""
    return optimizer.make(self.config.optimizer, self.schedule)

  def _key(self, purpose: int) -> jax.Array:
    """Returns the key of one purpose.

    0: encoder, 1: classifier, 2: negatives, 3: choice of labels, 4: drop path.
    """
    return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

  def _init_encoder(self) -> dict[str, Any]:
    """Initialises the encoder's parameters."""
    size = self.config.model.image_size
    images = jnp.zeros((1, size, size, 3), jnp.uint8)
    return self.model.init(self._key(0), images)['params']

  def _init(self) -> TrainState:
    """Initialises the whole state."""
    params = {
      'encoder': self._init_encoder(),
      'classifier': classifier.init(
        self._key(1),
        self.num_classes,
        self.config.model.embedding_dim,
        self.mesh.size,
      ),
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self._optimizer.init(params),
      ema=params['encoder'] if self.config.train.ema_decay else {},
      loss_average=jnp.float32(jnp.inf)
      if self.config.train.max_loss_ratio
      else {},
    )

  def _step(self, state: TrainState, batch: dict[str, jax.Array]):
    """Takes one step.

    If train.max_skipped_steps is not 0, a step whose loss or gradient is not
    finite or whose loss is a spike changes nothing but the step number.

    Args:
      state: the state before the step.
      batch: arrays shaped as in `abstract_batch`.

    Returns:
      The state after the step and its metrics, scalars by name.
    """
    batch = self._with_chosen_labels(batch, state.step)
    (loss, statistics), gradients = self._gradients(state, batch)
    with jax.named_scope('optimizer'):
      updates, opt_state = self._optimizer.update(
        gradients, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    params['encoder'] = batch_norm.follow(params['encoder'], statistics)
    metrics = {
      'train/loss': loss,
      'train/gradient_norm': optax.tree.norm(gradients),
      'train/images_without_labels': jnp.sum(1 - batch['weight']),
    }
    accepted = jnp.isfinite(loss) & jnp.isfinite(metrics['train/gradient_norm'])
    loss_average = state.loss_average
    if self.config.train.max_loss_ratio:
      spike = loss > self.config.train.max_loss_ratio * loss_average
      accepted &= ~spike
      metrics['train/spike'] = spike.astype(jnp.float32)
      # Infinite before the first step, whose loss then starts the average.
      loss_average = jnp.where(
        jnp.isinf(loss_average),
        loss,
        loss_average + _LOSS_RATE * (loss - loss_average),
      )
    new = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema=self._average(state, params['encoder']),
      loss_average=loss_average,
    )
    if self.config.train.max_skipped_steps:
      kept = jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, state)
      new = kept.replace(step=new.step)
    return new, metrics

  def _with_chosen_labels(self, batch, step):
    """Returns the batch with the labels that the loss uses, [B, P].

    An image without any label gets weight 0. `random` chooses anew each step;
    otherwise the first labels are used.
    """
    labels_BL, count = batch['labels'], self.config.loss.num_positives
    if self.config.loss.label_choice == 'random':
      key = jax.random.fold_in(self._key(3), step)
      chance_BL = jax.random.uniform(key, labels_BL.shape)
      # Below every uniform number, so that missing labels are chosen last.
      chance_BL = jnp.where(labels_BL < 0, -1, chance_BL)
      chosen_BP = lax.top_k(chance_BL, count)[1]
      labels_BL = jnp.take_along_axis(labels_BL, chosen_BP, axis=1)
    labels_BP = labels_BL[:, :count]
    labelled_B = jnp.any(labels_BP >= 0, axis=1)
    weight_B = jnp.where(labelled_B, batch['weight'], 0)
    return batch | {'labels': labels_BP, 'weight': weight_B}

  def _gradients(self, state, batch):
    """Returns ((loss, statistics), gradients) of a batch.

    The batch is processed in train.accumulate_steps parts. The sums over parts
    equal those of the whole batch, except that batch normalisation uses the
    statistics of each part and drop path draws anew for each. The returned
    statistics are the mean over parts.
    """
    # Weights are 0 or 1; a batch without labels must not divide by 0.
    total = jnp.maximum(jnp.sum(batch['weight']), 1)

    def mean_loss(params, part, i):
      loss, statistics = self._loss_sum(params, part, state.step, i)
      return loss / total, statistics

    gradients = jax.value_and_grad(mean_loss, has_aux=True)
    parts = self.config.train.accumulate_steps
    if parts == 1:
      return gradients(state.params, batch, 0)

    # Every part takes rows from every device, so no rows move between devices.
    def split(x):
      return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def add(carry, part):
      (loss, statistics), new = gradients(state.params, *part)
      carry = jax.tree.map(jnp.add, carry, (loss, new))
      return (carry[0], self._as_params(carry[1])), statistics

    zeros = self._as_params(jax.tree.map(jnp.zeros_like, state.params))
    (loss, summed), statistics = lax.scan(
      add,
      (jnp.zeros(()), zeros),
      (jax.tree.map(split, batch), jnp.arange(parts)),
    )
    return (loss, jax.tree.map(lambda x: x.mean(0), statistics)), summed

  def _as_params(self, tree):
    """Shards a tree of gradients like the parameters."""
    # Without this XLA may replicate the sum that the scan carries.
    return lax.with_sharding_constraint(tree, self._shardings.params)

  def _loss_sum(self, params, batch, step, part):
    """Returns the weighted sum of losses and the batch-norm statistics.

    Args:
      params: the parameters of encoder and classifier.
      batch: a part of the batch, with the labels to use.
      step: the number of steps taken before.
      part: the index of the part, which only drop path depends on.
    """
    key = jax.random.fold_in(self._key(4), step)
    with jax.named_scope('encoder'):
      out, seen = self._sharded_model.apply(
        {'params': params['encoder']},
        batch['image'],
        weight_B=batch['weight'],
        drop_path_key=jax.random.fold_in(key, part),
        mutable=batch_norm.STATISTICS,
      )
    with jax.named_scope('classifier'):
      loss_B = classifier.loss(
        params['classifier']['weight'],
        out['embedding'],
        batch['labels'],
        num_classes=self.num_classes,
        config=self.config.loss,
        dtype=jnp.dtype(self.config.model.dtype),
        # All parts of a step share their negatives, as in one large batch.
        key=jax.random.fold_in(self._key(2), step),
        mesh=self.mesh,
      )
    loss = jnp.sum(loss_B * batch['weight'])
    return loss, seen.get(batch_norm.STATISTICS, {})

  def _average(self, state, encoder):
    """Returns the moving average after a step; {} if train.ema_decay is 0."""
    decay = self.config.train.ema_decay
    if not decay:
      return {}
    # Average over few steps at first, or the random start would linger.
    decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
      lambda old, new: old + (1 - decay) * (new - old), state.ema, encoder
    )


def num_labels(config: ml_collections.ConfigDict) -> int:
  """Returns the number of labels per image in a batch.

  A random choice needs all stored labels; otherwise the loss's number is
  enough.
  """
  if config.loss.label_choice == 'random':
    return config.cluster.num_labels
  return config.loss.num_positives
