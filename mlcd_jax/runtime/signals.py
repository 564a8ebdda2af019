"""Handlers that end a run on SIGTERM or Ctrl-C with exit code 75.

No finished work is lost.
"""

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
  """Ends the process at once if a signal arrives inside the block.

  Nothing needs to be saved, because files are written atomically: a finished
  file is complete and an unfinished one is discarded. The handler does not
  raise an exception, since that could get lost. A signal can arrive in a
  callback of the garbage collector, for example, where exceptions are ignored.
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
  """Records the first signal inside the block without ending the process.

  A second signal ends the process at once, even while it saves.

  Yields:
    A function that returns whether a signal arrived.
  """
  received = []

  def handle(number, frame):
    del frame
    # Python handles signals only between bytecodes. Both signals came before
    # the first call of this handler could restore the defaults.
    if received:
      os._exit(128 + number)
    _restore_defaults()
    received.append(number)

  with _handled_by(handle):
    yield lambda: bool(received)


@contextlib.contextmanager
def _handled_by(handle) -> Iterator[None]:
  """Handles the signals with a function for the duration of the block."""
  before = {s: signal.signal(s, handle) for s in _SIGNALS}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _restore_defaults() -> None:
  """Lets the next signal end the process at once."""
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_DFL)
