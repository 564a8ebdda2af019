"""The train state and the one jitted step."""

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

# How much of a step's loss goes into the average that spikes are told by: the
# last hundred steps or so.
_LOSS_RATE = 0.01


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    step: int32 scalar, steps taken.
    params: {"encoder": ..., "classifier": {"weight"}}, float32; a ResNet's
      encoder includes its running averages.
    opt_state: of optax.
    ema: moving average of params["encoder"]; {} without one.
    loss_average: of the steps taken, float32 scalar, infinite before the
      first; {} without a rule for spikes.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: Any
  ema: dict[str, Any]
  loss_average: Any

  @property
  def encoder(self) -> dict[str, Any]:
    """The encoder to use: its average where there is one."""
    return self.ema or self.params['encoder']


@dataclasses.dataclass(frozen=True)
class Program:
  """The jitted parts of training, before any array exists.

  Attributes:
    config: the whole config.
    num_classes: of the classifier, without padding.
    steps: of the whole run.
    mesh: of all devices.
  """

  config: ml_collections.ConfigDict
  num_classes: int
  steps: int
  mesh: Mesh

  @functools.cached_property
  def model(self):
    """The encoder."""
    return models.make(self.config.model)

  @functools.cached_property
  def schedule(self) -> optax.Schedule:
    """Step -> learning rate."""
    return optimizer.make_schedule(self.config.optimizer, self.steps)

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the state."""
    classifier.check_devices(self.num_classes, self.mesh.size)
    shapes = jax.eval_shape(self._init)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.state_shardings(self.mesh, shapes),
    )

  @property
  def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a batch."""
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
    """Makes the state of step 0, the same on every mesh."""
    return jax.jit(self._init, out_shardings=self._shardings)()

  def init_encoder(self) -> dict[str, Any]:
    """The encoder's parameters of step 0, without the rest of the state."""
    return jax.jit(
      self._init_encoder, out_shardings=self._shardings.params['encoder']
    )()

  @functools.cached_property
  def step(self):
    """(state, batch) -> (state, metrics); the old state is given up."""
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
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  @functools.cached_property
  def _optimizer(self) -> optax.GradientTransformation:
    return optimizer.make(self.config.optimizer, self.schedule)

  def _key(self, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

  def _init_encoder(self) -> dict[str, Any]:
    size = self.config.model.image_size
    images = jnp.zeros((1, size, size, 3), jnp.uint8)
    return self.model.init(self._key(0), images)['params']

  def _init(self) -> TrainState:
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
    batch = self._with_chosen_labels(batch, state.step)
    (loss, statistics), gradients = self._gradients(state, batch)
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
    """The batch with as many labels as the loss uses, or fewer."""
    labels_BL, count = batch['labels'], self.config.loss.num_positives
    if self.config.loss.label_choice == 'random':
      key = jax.random.fold_in(self._key(3), step)
      chance_BL = jax.random.uniform(key, labels_BL.shape)
      chance_BL = jnp.where(labels_BL < 0, -1, chance_BL)  # Padding last.
      chosen_BP = lax.top_k(chance_BL, count)[1]
      labels_BL = jnp.take_along_axis(labels_BL, chosen_BP, axis=1)
    labels_BP = labels_BL[:, :count]
    labelled_B = jnp.any(labels_BP >= 0, axis=1)
    weight_B = jnp.where(labelled_B, batch['weight'], 0)
    return batch | {'labels': labels_BP, 'weight': weight_B}

  def _gradients(self, state, batch):
    """((loss, statistics), gradients), over train.accumulate_steps parts.

    The statistics are the mean of the parts', each normalised by its own.
    """
    total = jnp.maximum(jnp.sum(batch['weight']), 1)

    def mean_loss(params, part, i):
      loss, statistics = self._loss_sum(params, part, state.step, i)
      return loss / total, statistics

    gradients = jax.value_and_grad(mean_loss, has_aux=True)
    parts = self.config.train.accumulate_steps
    if parts == 1:
      return gradients(state.params, batch, 0)

    def split(x):  # Every part takes rows from every device.
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
    return lax.with_sharding_constraint(tree, self._shardings.params)

  def _loss_sum(self, params, batch, step, part):
    """The weighted sum of the images' losses; statistics of their maps."""
    key = jax.random.fold_in(self._key(4), step)
    out, seen = self.model.apply(
      {'params': params['encoder']},
      batch['image'],
      weight_B=batch['weight'],
      drop_path_key=jax.random.fold_in(key, part),
      mutable=batch_norm.STATISTICS,
    )
    loss_B = classifier.loss(
      params['classifier']['weight'],
      out['embedding'],
      batch['labels'],
      num_classes=self.num_classes,
      config=self.config.loss,
      dtype=jnp.dtype(self.config.model.dtype),
      # All parts of a step share its negatives.
      key=jax.random.fold_in(self._key(2), step),
      mesh=self.mesh,
    )
    loss = jnp.sum(loss_B * batch['weight'])
    return loss, seen.get(batch_norm.STATISTICS, {})

  def _average(self, state, encoder):
    decay = self.config.train.ema_decay
    if not decay:
      return {}
    # Short at first, or the random start would linger.
    decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
      lambda old, new: old + (1 - decay) * (new - old), state.ema, encoder
    )


def num_labels(config: ml_collections.ConfigDict) -> int:
  """Labels of an image in a batch; a random choice needs all stored ones."""
  if config.loss.label_choice == 'random':
    return config.cluster.num_labels
  return config.loss.num_positives
