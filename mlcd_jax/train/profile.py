"""The trace of some steps by JAX's profiler, for TensorBoard and Perfetto."""

from collections.abc import Iterator
import contextlib
import logging
import pathlib
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Trace(contextlib.AbstractContextManager):
  """Traces the steps from `first` to `last`, on every process.

  The trace lies where TensorBoard's profile plugin looks for it, beside the
  curves: FOLDER/plugins/profile/. A run that ends within the steps writes what
  it has.
  """

  def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
    """Starts nothing yet.

    Args:
      steps: (first, last), counted from 1; () for no trace.
      folder: the folder of TensorBoard's files.
    """
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._folder = folder
    self._runs = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Marks the dispatch of a step, before which the trace may start."""
    if number in self._steps and not self._runs:
      jax.profiler.start_trace(self._folder)
      self._runs = True
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield

  def dispatched(self, number: int, metrics: Any) -> None:
    """Ends the trace after its last step.

    Args:
      number: the number of the step.
      metrics: its results, which the trace waits for.
    """
    if self._runs and number == self._steps[-1]:
      jax.block_until_ready(metrics)
      self._stop()

  def __exit__(self, *error):
    """Writes the trace if it runs."""
    self._stop()

  def _stop(self) -> None:
    if self._runs:
      self._runs = False
      jax.profiler.stop_trace()
      _log.info('train: the trace lies in %s', self._folder / 'plugins/profile')
