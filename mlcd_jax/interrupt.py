"""SIGTERM and Ctrl-C end a run with exit code 75, nothing finished lost."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import signal

from mlcd_jax import errors

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def raising() -> Iterator[None]:
  """Inside, the first signal raises Stopped; the second ends the process."""

  def handle(number, frame):
    del frame
    _restore_defaults()
    raise errors.Stopped(
      f'stopped by {signal.Signals(number).name}; run the same command to '
      'continue'
    )

  with _handled_by(handle):
    yield


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
  """Inside, the first signal is only noted; yields whether there was one."""
  received = []

  def handle(number, frame):
    del frame
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
