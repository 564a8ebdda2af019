"""The train stage: state, step and loop."""

import dataclasses
import functools
import logging
import math
import pathlib
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import ml_collections
import numpy as np
import optax

from mlcd_jax import checkpoint
from mlcd_jax import classifier
from mlcd_jax import embeddings
from mlcd_jax import errors
from mlcd_jax import interrupt
from mlcd_jax import labels as labels_lib
from mlcd_jax import manifests
from mlcd_jax import metrics as metrics_lib
from mlcd_jax import models
from mlcd_jax import optimizer
from mlcd_jax import sharding
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources

_log = logging.getLogger(__name__)


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    step: int32 scalar, steps taken.
    params: {"encoder": ..., "classifier": {"weight"}}, float32.
    opt_state: of optax.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Program:
  """The jitted parts of training, before any array exists."""

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
    shapes = jax.eval_shape(self._init)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      sharding.state_shardings(self.mesh, shapes),
    )

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
        self._key(1), self.num_classes, self.config.model.embedding_dim
      ),
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=self._optimizer.init(params),
    )

  def _step(self, state: TrainState, batch: dict[str, jax.Array]):
    def loss_fn(params):
      out = self.model.apply({'params': params['encoder']}, batch['image'])
      loss_B = classifier.loss(
        params['classifier']['weight'],
        out['embedding'],
        batch['labels'],
        num_classes=self.num_classes,
        config=self.config.loss,
        dtype=jnp.dtype(self.config.model.dtype),
        key=jax.random.fold_in(self._key(2), state.step),
        mesh=self.mesh,
      )
      weight_B = batch['weight']
      return jnp.sum(loss_B * weight_B) / jnp.maximum(jnp.sum(weight_B), 1)

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = self._optimizer.update(
      gradients, state.opt_state, state.params
    )
    metrics = {
      'train/loss': loss,
      'train/gradient_norm': optax.tree.norm(gradients),
      'train/images_without_labels': jnp.sum(1 - batch['weight']),
    }
    state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )
    return state, metrics


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  workdir: pathlib.Path,
  embeddings_folder: pathlib.Path,
  labels: labels_lib.Labels,
  mesh: Mesh,
) -> None:
  """Trains to the end, or as far as this invocation may.

  Raises:
    UserError: the images and labels do not fit, or the batch and the mesh.
    RunError: the loss is not finite.
    Stopped: by a signal, after saving.
  """
  source = sources.make(config.data)
  sources.check_bad_keys(config.data.bad_keys, manifest)
  label_rows = _label_rows(config, source, embeddings_folder)
  program = Program(
    config=config,
    num_classes=labels.num_classes,
    steps=num_steps(config, len(source)),
    mesh=mesh,
  )
  checkpointer = checkpoint.Checkpointer(
    manifest.folder, every_steps=config.train.checkpoint_every_steps
  )
  state, first = _restore_or_init(program, checkpointer)
  last = program.steps
  if config.train.stop_after_steps:
    last = min(last, first + config.train.stop_after_steps)
  batches = pipelines.train_batches(
    source,
    label_rows,
    labels,
    num_positives=config.loss.num_positives,
    batch_size=config.train.batch_size,
    image_size=config.model.image_size,
    crop_area=tuple(config.data.crop_area),
    flip=config.data.flip,
    seed=config.seed,
    start_step=first,
    num_workers=config.data.num_workers,
    max_bad_fraction=config.data.max_bad_fraction,
  )
  batches = pipelines.Prefetched(
    batches, functools.partial(sharding.put_batch, mesh)
  )
  log = _Log(program, workdir, first)
  try:
    with interrupt.noted() as interrupted:
      _loop(program, state, batches, checkpointer, log, last, interrupted)
  finally:
    batches.close()
    log.close()
    checkpointer.close()
  if last == program.steps:
    manifest.finish(step=last)


def _loop(program, state, batches, checkpointer, log, last, interrupted):
  """Data, step, log, save, in this order, from the state's step to `last`.

  A step's metrics are fetched after the next one was dispatched, so that the
  devices never wait for the host.
  """
  step = int(state.step)
  while step < last:
    state, metrics = program.step(state, next(batches))
    step += 1
    log.add(step, metrics, batches.seconds_waited)
    if interrupted():
      log.flush()
      checkpointer.save(step, state, force=True)
      checkpointer.close()
      raise errors.Stopped(
        f'stopped at step {step} after saving; run the same command to continue'
      )
    checkpointer.save(step, state, force=step == last)
  log.flush()


def num_steps(config: ml_collections.ConfigDict, num_images: int) -> int:
  """Steps of the whole run; `epochs` are turned into whole steps."""
  if config.train.steps:
    return config.train.steps
  return max(
    1, round(config.train.epochs * num_images / config.train.batch_size)
  )


def _label_rows(
  config: ml_collections.ConfigDict,
  source: sources.Source,
  embeddings_folder: pathlib.Path,
) -> np.ndarray:
  """Each record's row among the labels, or -1; refuses too many of those."""
  keys = source.keys()
  label_keys = embeddings.Embeddings(embeddings_folder).keys()
  rows = labels_lib.join(keys, label_keys)
  missing = np.flatnonzero(rows < 0)
  unused = len(label_keys) - (len(keys) - len(missing))
  if len(missing) > config.data.max_bad_fraction * len(keys):
    examples = ', '.join(
      k.decode('utf-8', 'replace') for k in keys[missing[:3]]
    )
    raise errors.UserError(
      f'data.path: {len(missing)} of {len(keys)} images have no labels '
      f'(such as {examples}), more than data.max_bad_fraction='
      f'{config.data.max_bad_fraction} allows; the labels were made from '
      'other images'
    )
  if len(missing) or unused:
    _log.warning(
      'train: %d of %d images have no labels and weigh nothing; %d of %d '
      'label rows have no image',
      len(missing),
      len(keys),
      unused,
      len(label_keys),
    )
  return rows


def _restore_or_init(
  program: Program, checkpointer: checkpoint.Checkpointer
) -> tuple[TrainState, int]:
  """The state to go on from, and its step."""
  step = checkpointer.latest_step()
  if step is None:
    return program.init(), 0
  _log.info('train: continuing from step %d', step)
  return checkpointer.restore(step, program.abstract_state), step


class _Log:
  """Writes metrics every so many steps, one step late."""

  def __init__(self, program: Program, workdir: pathlib.Path, first: int):
    self._schedule = program.schedule
    self._every = program.config.train.log_every_steps
    self._batch_size = program.config.train.batch_size
    self._writer = metrics_lib.Writer(workdir, first_step=first + 1)
    self._progress = metrics_lib.Progress(
      'train', program.steps, unit='steps', done=first
    )
    self._pending = None
    self._timed_from = None  # (step, time, wait) rates count from.

  def add(
    self, step: int, metrics: dict[str, jax.Array], seconds_waited: float
  ) -> None:
    """Takes a step's metrics, writes those of the step before if due.

    Args:
      step: number.
      metrics: of the step.
      seconds_waited: for data, since the beginning.
    """
    self.flush(last=False)
    self._pending = step, metrics, seconds_waited

  def flush(self, *, last: bool = True) -> None:
    """Writes what is pending, if due or the last."""
    if self._pending is None:
      return
    step, metrics, waited = self._pending
    self._pending = None
    values = {k: float(v) for k, v in metrics.items()}
    for name in ('train/loss', 'train/gradient_norm'):
      if not math.isfinite(values[name]):
        raise errors.RunError(
          f'{name} is {values[name]} at step {step}; lower '
          'optimizer.learning_rate and run again in another --workdir'
        )
    now = time.monotonic()
    if self._timed_from is None:  # Compiling is not counted.
      self._timed_from = step, now, waited
    if not (last or step == 1 or step % self._every == 0):
      return
    values['train/learning_rate'] = float(self._schedule(step - 1))
    from_step, since, waited_before = self._timed_from
    if step > from_step:
      images = (step - from_step) * self._batch_size
      values['train/images_per_second'] = images / (now - since)
      values['train/data_wait_fraction'] = (waited - waited_before) / (
        now - since
      )
      self._timed_from = step, now, waited
    self._writer.write(step, values)
    self._progress.update(
      step,
      loss=values['train/loss'],
      images_per_second=values.get('train/images_per_second', math.nan),
    )

  def close(self) -> None:
    """Flushes the files."""
    self._writer.close()
