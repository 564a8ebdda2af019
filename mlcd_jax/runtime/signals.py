"""SIGTERM and Ctrl-C end a run with exit code 75, nothing finished lost."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import signal

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import terminal
from mlcd_jax.runtime import watchdog

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def exiting() -> Iterator[None]:
  """Inside, a signal ends the process at once, where nothing needs saving.

  Finished files are whole and unfinished ones do not count, so that no more
  is to be done. An exception would not do: raised wherever the signal finds
  the program, say in a callback of the garbage collector, it can get lost.
  """

  def handle(number, frame):
    del frame
    _restore_defaults()
    name = signal.Signals(number).name
    line = f'stopped by {name}; run the same command to continue'
    os.write(2, terminal.eraser() + f'error: {line}\n'.encode())
    watchdog.tell(errors.Stopped.exit_code, line)
    os._exit(errors.Stopped.exit_code)

  with _handled_by(handle):
    yield


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
  """Inside, the first signal is only noted; yields whether there was one.

  The second one ends the process at once, whatever it is saving.
  """
  received = []

  def handle(number, frame):
    del frame
    if received:  # Both came while the program was in no Python code.
      os._exit(128 + number)
    _restore_defaults()
    received.append(number)

  with _handled_by(handle):
    yield lambda: bool(received)


@contextlib.contextmanager
def _handled_by(handle) -> Iterator[None]:
  before = {s: signal.signal(s, handle) for s in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _restore_defaults() -> None:
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_DFL)
