"""The train stage: data, step and loop."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
import logging
import math
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import checkpoint
from mlcd_jax import distributed
from mlcd_jax import embeddings
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import hardware
from mlcd_jax import initial
from mlcd_jax import interrupt
from mlcd_jax import labels as labels_lib
from mlcd_jax import manifests
from mlcd_jax import metrics as metrics_lib
from mlcd_jax import sharding
from mlcd_jax import summary
from mlcd_jax import train_step
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import matching
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.huggingface import folders

_log = logging.getLogger(__name__)

_MUST_BE_FINITE = ('train/loss', 'train/gradient_norm')

# (program, parameters of the encoder) -> scores by name.
Evaluate = Callable[[train_step.Program, Any], Mapping[str, float | None]]

# What a process wishes for at the end of a step; the greatest is done.
_SAVE, _STOP = 1, 2


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  workdir: pathlib.Path,
  embedded: manifests.Manifest,
  labels: labels_lib.Labels,
  mesh: Mesh,
  evaluate: Evaluate | None = None,
  on_log: Callable[[], None] = lambda: None,
) -> None:
  """Trains to the end, or as far as this invocation may.

  Args:
    config: of the run.
    manifest: of this stage.
    workdir: where the metrics go.
    embedded: manifest of the embed stage, whose rows the labels are of.
    labels: of those rows.
    mesh: of all devices.
    evaluate: scores the encoder every evaluate.every_steps.
    on_log: called after metrics were written.

  Raises:
    UserError: the images and labels do not fit, or the batch and the mesh.
    RunError: the loss is not finite.
    Stopped: by a signal, after saving.
  """
  source = sources.make(config.data)
  sources.check_same(source, 'data.path')
  sources.check_bad_keys(config.data.bad_keys, manifest)
  label_rows = _label_rows(config, source, embedded)
  if config.model.init_from and 'init_from' not in manifest.notes:
    path = folders.pinned(config.model.init_from, 'model.init_from')
    manifest.notes['init_from'] = path
    manifest.save()
  program = train_step.Program(
    config=config,
    num_classes=labels.num_classes,
    steps=num_steps(config, len(source)),
    mesh=mesh,
  )
  _log.info('train: parameters\n%s', summary.parameters(program))
  checkpointer = checkpoint.Checkpointer(
    manifest.folder,
    keep=config.train.keep_checkpoints,
    keep_every_steps=config.train.keep_every_steps,
    keep_best=config.train.keep_best,
    best_is=config.train.best_is,
  )
  state, first = _restore_or_init(program, checkpointer, clusters=labels.folder)
  last = program.steps
  if config.train.stop_after_steps:
    last = min(last, first + config.train.stop_after_steps)
  batches = pipelines.Prefetched(
    _batches(config, source, label_rows, labels, first, mesh),
    functools.partial(sharding.put_batch, mesh),
  )
  log = _Log(
    program,
    workdir,
    first,
    keys=functools.partial(_keys, config, source),
    on_log=on_log,
  )
  try:
    with interrupt.noted() as interrupted:
      _loop(
        program, state, batches, checkpointer, log, last, interrupted, evaluate
      )
  finally:
    batches.close()
    log.close()
    checkpointer.close()
  if last == program.steps:
    manifest.finish(step=last)


def _batches(config, source, label_rows, labels, first, mesh):
  """This host's rows of the batches after step `first`."""
  return pipelines.train_batches(
    source,
    label_rows,
    labels,
    num_positives=train_step.num_labels(config),
    batch_size=config.train.batch_size,
    image_size=config.model.image_size,
    crop_area=tuple(config.data.crop_area),
    flip=config.data.flip,
    seed=config.seed,
    start_step=first,
    num_workers=config.data.num_workers,
    max_bad_fraction=config.data.max_bad_fraction,
    rows=sharding.own_rows(mesh, config.train.batch_size),
  )


def _loop(
  program, state, batches, checkpointer, log, last, interrupted, evaluate
):
  """Data, step, log, save, in this order, from the state's step to `last`.

  A step's metrics are fetched after the next one was dispatched, so that the
  devices never wait for the host; only before a state is saved are its own
  fetched, since one that is not finite must not replace a good one.
  """
  every = program.config.train.checkpoint_every_steps
  evaluate_every = program.config.evaluate.every_steps
  seconds = 60 * program.config.train.checkpoint_every_minutes
  # A signal to one process stops all after the same step, and its clock makes
  # all save.
  agree = distributed.agreement(program.mesh)
  step = int(state.step)
  saved_step, saved_at = step, time.monotonic()
  while step < last:
    state, metrics = program.step(state, next(batches))
    step += 1
    log.add(step, metrics, batches.seconds_waited)
    if evaluate and step % evaluate_every == 0:
      log.evaluated(step, evaluate(program, state.encoder))
    late = seconds and time.monotonic() - saved_at > seconds
    wish = agree(_STOP if interrupted() else _SAVE if late else 0)
    if wish == _SAVE and step == saved_step + 1 and jax.process_count() > 1:
      wish = 0  # The answer to what was asked before the save.
    stopped = wish == _STOP
    if wish or step == last or step % every == 0:
      log.flush(last=stopped or step == last)
      with log.saving():
        checkpointer.save(step, state, log.latest())
      saved_step, saved_at = step, time.monotonic()
    if stopped:
      checkpointer.close()
      raise errors.Stopped(
        f'stopped at step {step} after saving; run the same command to continue'
      )


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
  embedded: manifests.Manifest,
) -> np.ndarray:
  """Each record's row among the labels, or -1; refuses too many of those."""
  keys = source.keys()
  label_keys = embeddings.open_made(embedded).keys()
  rows = matching.join(keys, label_keys, matching.root_of(config.data.path))
  missing = np.flatnonzero(rows < 0)
  is_unused = np.ones(len(label_keys), bool)
  is_unused[rows[rows >= 0]] = False
  unused = np.sum(is_unused)
  if len(missing) > config.data.max_bad_fraction * len(keys):
    others = label_keys[np.flatnonzero(is_unused)[:3]]
    raise errors.UserError(
      f'data.path: {len(missing)} of {len(keys)} images have no labels '
      f'(such as {_named(keys[missing[:3]])}), more than data.max_bad_fraction='
      f'{config.data.max_bad_fraction} allows; {unused} labels have no image '
      f'(such as {_named(others)}). They were made from other images, or these '
      'have other keys there: embed the images of data.path, or give both the '
      'same keys'
    )
  if len(missing) or unused:
    repeated = np.isin(label_keys[is_unused], label_keys[rows[rows >= 0]])
    _log.warning(
      'train: %d of %d images have no labels and weigh nothing; %d of %d '
      'label rows have no image%s',
      len(missing),
      len(keys),
      unused,
      len(label_keys),
      f', {repeated.sum()} of them since an earlier row has the same key'
      * bool(repeated.any()),
    )
  return rows


def _named(keys: np.ndarray) -> str:
  return ', '.join(map(keys_lib.text, keys.tolist()))


def _keys(
  config: ml_collections.ConfigDict, source: sources.Source, step: int
) -> list[str]:
  """The keys of the batch that step number `step`, from 1, is made with."""
  first = (step - 1) * config.train.batch_size
  places = range(first, first + config.train.batch_size)
  keys = source.keys()
  return [
    keys[pipelines.record_at(place, len(source), config.seed)].decode(
      'utf-8', 'replace'
    )
    for place in places
  ]


def _restore_or_init(
  program: train_step.Program,
  checkpointer: checkpoint.Checkpointer,
  *,
  clusters: pathlib.Path,
) -> tuple[train_step.TrainState, int]:
  """The state to go on from, and its step."""
  restored = checkpointer.restore_latest(program.abstract_state)
  if restored is None:
    return initial.make(program, clusters=clusters), 0
  _log.info('train: continuing from step %d', restored[1])
  return restored


class _Log:
  """Writes metrics every so many steps, one step late."""

  def __init__(
    self,
    program: train_step.Program,
    workdir: pathlib.Path,
    first: int,
    *,
    keys: Callable[[int], list[str]],
    on_log: Callable[[], None],
  ):
    self._schedule = program.schedule
    self._every = program.config.train.log_every_steps
    self._batch_size = program.config.train.batch_size
    self._flops = sum(
      hardware.train_flops(program.config, program.num_classes).values()
    )
    self._peak = hardware.peak_flops(program.mesh.devices.flat)
    self._writer = metrics_lib.Writer(
      workdir, first_step=first + 1, config=program.config
    )
    self._progress = metrics_lib.Progress(
      'train', program.steps, unit='steps', done=first
    )
    self._workdir = workdir
    self._keys = keys  # Of a step's batch.
    self._on_log = on_log
    self._saving = 0.0  # Seconds since what was written last.
    self._skipped = 0
    self._max_skipped = program.config.train.max_skipped_steps
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

  def flush(self, *, last: bool) -> None:
    """Checks what is pending, and writes it if due or the last.

    Raises:
      RunError: the loss or its gradient is not finite, or the loss a spike.
    """
    if self._pending is None:
      return
    step, metrics, waited = self._pending
    self._pending = None
    values = {k: float(v) for k, v in metrics.items()}
    self._check_step(step, values)
    self._progress.update(step, loss=values['train/loss'])
    now = time.monotonic()
    if self._timed_from is None:  # Compiling is not counted.
      self._timed_from = step, now, waited
    if not (last or step == 1 or step % self._every == 0):
      return
    if self._max_skipped:
      values['train/skipped_steps'] = float(self._skipped)
    values['train/learning_rate'] = float(self._schedule(step - 1))
    from_step, since, waited_before = self._timed_from
    if step > from_step:
      images = (step - from_step) * self._batch_size
      rate = images / (now - since)
      values['train/images_per_second'] = rate
      values['train/data_wait_fraction'] = (waited - waited_before) / (
        now - since
      )
      values['train/save_fraction'] = self._saving / (now - since)
      if self._peak:
        utilisation = rate * self._flops / self._peak
        values['train/model_flop_utilisation'] = utilisation
      self._timed_from, self._saving = (step, now, waited), 0.0
    self._writer.write(step, values)
    self._on_log()

  def evaluated(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes the scores at a step, after its own metrics if these are due."""
    self.flush(last=False)
    self._writer.write(step, {k: v for k, v in values.items() if v is not None})
    self._timed_from = None  # Neither is evaluating.

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Counts the time inside as saving."""
    start = time.monotonic()
    yield
    self._saving += time.monotonic() - start

  def _check_step(self, step: int, values: dict[str, float]) -> None:
    """Counts a step that must not be taken, or raises RunError."""
    broken = [n for n in _MUST_BE_FINITE if not math.isfinite(values[n])]
    if not broken and not values.get('train/spike'):
      return
    kind, name = (
      ('not_finite', broken[0]) if broken else ('spike', 'train/loss')
    )
    keys = self._keys(step)
    path = self._workdir / f'{kind}_{step}.txt'
    if distributed.is_main():
      with files.atomic(path) as temporary:
        temporary.write_text(''.join(f'{key}\n' for key in keys))
    says = (
      f'{name} is {values[name]} at step {step}'
      + ', a spike by train.max_loss_ratio' * (kind == 'spike')
      + ', on a batch with '
      + ', '.join(keys[:3])
      + f' and {len(keys) - 3} more (all in {path})' * (len(keys) > 3)
    )
    self._skipped += 1
    if self._skipped > self._max_skipped:
      raise errors.RunError(
        f'{says}; lower optimizer.learning_rate and run again in another '
        f'--workdir, or allow more than train.max_skipped_steps='
        f'{self._max_skipped}'
      )
    _log.warning('train: skipped: %s', says)

  def latest(self) -> dict[str, float]:
    """See metrics.Writer.latest."""
    return self._writer.latest()

  def close(self) -> None:
    """Flushes the files."""
    self._writer.close()
