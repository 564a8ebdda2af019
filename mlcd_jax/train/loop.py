"""The training loop: data, step, log, save, in this order."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import logging
import math
import pathlib
import time
from typing import Any

import jax

from mlcd_jax.data import pipelines
from mlcd_jax.runtime import chips
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import progress
from mlcd_jax.train import flops
from mlcd_jax.train import metrics as metrics_lib
from mlcd_jax.train import profile
from mlcd_jax.train import step as step_lib
from mlcd_jax.weights import checkpoint

_log = logging.getLogger(__name__)

# What a process can ask for at the end of a step. All processes follow the
# largest request.
_SAVE, _STOP = 1, 2

# Maps (program, parameters of the encoder) to scores by name; None = no score.
Evaluate = Callable[[step_lib.Program, Any], Mapping[str, float | None]]

_MUST_BE_FINITE = ('train/loss', 'train/gradient_norm')


class Log:
  """Checks the metrics of every step and writes them every few steps.

  It reads the metrics of a step after the next step has started, so that the
  devices never wait for the host.
  """

  def __init__(
    self,
    program: step_lib.Program,
    workdir: pathlib.Path,
    first: int,
    *,
    keys: Callable[[int], list[str]],
    on_log: Callable[[], None],
  ):
    """Opens the outputs.

    Args:
      program: the program of the run.
      workdir: the folder of the run.
      first: the number of steps taken before this invocation.
      keys: the function from a step to the keys of its batch.
      on_log: a function to call after metrics were written.
    """
    self._schedule = program.schedule
    self._every = program.config.train.log_every_steps
    self._batch_size = program.config.train.batch_size
    self._flops = sum(
      flops.train_flops(program.config, program.num_classes).values()
    )
    self._peak = chips.peak_flops(program.mesh.devices.flat)
    self._writer = metrics_lib.Writer(
      workdir, first_step=first + 1, config=program.config
    )
    self._progress = progress.Progress(
      'train', program.steps, unit='steps', done=first
    )
    self._workdir = workdir
    self._keys = keys
    self._on_log = on_log
    self._saving = 0.0  # Seconds spent saving since the last write.
    self._skipped = 0
    self._max_skipped = program.config.train.max_skipped_steps
    self._pending = None
    self._timed_from = None  # (step, time, seconds waited) at the last write.

  def add(
    self, step: int, metrics: dict[str, jax.Array], seconds_waited: float
  ) -> None:
    """Takes the metrics of a step and flushes those of the previous step.

    Args:
      step: the number of the step, from 1.
      metrics: the metrics of the step, still on the devices.
      seconds_waited: the seconds spent waiting for data since the start.

    Raises:
      RunError: the previous step failed its check, see `flush`.
    """
    self.flush(last=False)
    self._pending = step, metrics, seconds_waited

  def flush(self, *, last: bool) -> None:
    """Checks the pending metrics and writes them if due.

    Args:
      last: write them even if they are not due.

    Raises:
      RunError: the loss or the gradient is not finite or the loss is a spike,
        in more steps than train.max_skipped_steps allows.
    """
    if self._pending is None:
      return
    step, metrics, waited = self._pending
    self._pending = None
    values = {k: float(v) for k, v in metrics.items()}
    self._check_step(step, values)
    self._progress.update(step, loss=values['train/loss'])
    now = time.monotonic()
    if self._timed_from is None:  # Rates exclude the first step's compilation.
      self._timed_from = step, now, waited
    if not (last or step == 1 or step % self._every == 0):
      return
    if self._max_skipped:
      values['train/skipped_steps'] = float(self._skipped)
    # The optimizer counts steps from 0.
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
    """Writes scores of the encoder, after the pending metrics.

    Args:
      step: the number of the last step before the evaluation.
      values: scores by name; None is not written.
    """
    self.flush(last=False)
    self._writer.write(step, {k: v for k, v in values.items() if v is not None})
    self._timed_from = None  # Rates exclude the time of an evaluation.

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Counts the time in the context as time spent saving."""
    start = time.monotonic()
    yield
    self._saving += time.monotonic() - start

  def _check_step(self, step: int, values: dict[str, float]) -> None:
    """Checks the metrics of a step.

    A step fails if its loss or gradient is not finite or its loss is a spike.
    Failed steps are counted, and the keys of the images in their batches are
    written to files in the workdir.

    Args:
      step: the number of the step.
      values: the metrics of the step.

    Raises:
      RunError: more steps failed than train.max_skipped_steps allows.
    """
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
    """Returns the last values, see metrics.Writer.latest."""
    return self._writer.latest()

  def close(self) -> None:
    """Closes the files; pending metrics are not written."""
    self._writer.close()


def run(
  program: step_lib.Program,
  state: step_lib.TrainState,
  batches: pipelines.Prefetched,
  *,
  last: int,
  checkpointer: checkpoint.Checkpointer,
  log: Log,
  trace: profile.Trace,
  interrupted: Callable[[], bool],
  evaluate: Evaluate | None,
) -> None:
  """Trains from the step of the state to `last`.

  The metrics of a step are fetched after the next step was dispatched, so that
  the devices never wait for the host. The exception is a step whose state is
  saved: its metrics are checked first, since a state that is not finite must
  not replace a good checkpoint.

  Args:
    program: the program of the run, with its jitted step.
    state: the state to start from.
    batches: the batches after that state, on the devices.
    last: the number of the last step.
    checkpointer: the checkpointer that saves the states.
    log: the log that takes the metrics of each step.
    trace: the profiler's trace of some steps.
    interrupted: a function that returns whether a signal asked this process
      to stop.
    evaluate: a function that scores the encoder every evaluate.every_steps;
      None = never.

  Raises:
    RunError: too many steps failed their check, see `Log.flush`.
    Stopped: a signal stopped training, after the state was saved.
  """
  every = program.config.train.checkpoint_every_steps
  evaluate_every = program.config.evaluate.every_steps
  seconds = 60 * program.config.train.checkpoint_every_minutes
  # A signal to one process must stop all of them after the same step, and a
  # save that is due by one clock must be a save of all.
  agree = distributed.agreement(program.mesh)
  step = int(state.step)
  saved_step, saved_at = step, time.monotonic()
  while step < last:
    with trace.step(step + 1):
      state, metrics = program.step(state, next(batches))
    step += 1
    trace.dispatched(step, metrics)
    log.add(step, metrics, batches.seconds_waited)
    if evaluate and step % evaluate_every == 0:
      log.evaluated(step, evaluate(program, state.encoder))
    late = seconds and time.monotonic() - saved_at > seconds
    wish = agree(_STOP if interrupted() else _SAVE if late else 0)
    if wish == _SAVE and step == saved_step + 1 and jax.process_count() > 1:
      # With several processes the answer is one step old, so this one still
      # belongs to the save just done.
      wish = 0
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
