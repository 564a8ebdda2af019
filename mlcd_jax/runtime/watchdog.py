"""A watchdog that ends all processes of a run when one is lost or stops.

Every process writes heartbeats to the key-value store of jax.distributed and
writes a notice before it ends early. Process 0 watches both. When a process is
lost or gives notice, process 0 writes one verdict. All processes read it and
end with the same exit code and a line that names the process. Without this,
jaxlib aborts with a stack trace that names no process.
"""

import ctypes
import json
import os
import re
import signal
import threading
import time
from typing import Any

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import terminal

_BEATS = 'mlcd_jax/beat/'
_NOTICES = 'mlcd_jax/notice/'
_VERDICT = 'mlcd_jax/verdict'

# XLA's error messages begin with a status, such as "UNKNOWN: ".
_STATUS = re.compile('[A-Z_]+: ')

# Heartbeats in one timeout, so that a few late ones do not count as a loss; and
# the most seconds between two heartbeats, so that long timeouts do not delay
# notices.
_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL = 2.0

_watch: '_Watch | None' = None


def start(client: Any, index: int, count: int, timeout: float) -> None:
  """Starts the watchdog's thread.

  Args:
    client: the client of jax.distributed.
    index: the index of this process.
    count: the number of processes.
    timeout: the seconds without a heartbeat after which a process is lost.
  """
  global _watch
  _watch = _Watch(client, index, count, timeout)


def started() -> bool:
  """Returns whether the watchdog runs, as it does with several processes."""
  return _watch is not None


def stop() -> None:
  """Ends the thread; call it when all processes are done."""
  global _watch
  if _watch is not None:
    _watch.stopped.set()
    _watch = None


def tell(code: int, says: str) -> None:
  """Tells the other processes that this one is about to end.

  Args:
    code: the exit code of this process. The others end with it if it is that of
      a UserError or a stop, and with that of a RunError otherwise.
    says: the reason, in one line.
  """
  if _watch is not None:
    _watch.tell(code, says)


def may_be_lost(e: Exception) -> bool:
  """Returns whether the loss of another process may have caused an error.

  XLA raises a RuntimeError then. If the program runs in the calling thread it
  raises a ValueError, whose message begins with a status such as UNKNOWN.
  """
  return started() and (
    isinstance(e, RuntimeError) or bool(_STATUS.match(str(e)))
  )


def wait() -> None:
  """Waits as long as a verdict can take; the verdict ends the process.

  Call it after an error that a lost process may have caused, such as a broken
  connection.
  """
  if _watch is not None:
    # Process 0 needs the timeout to notice the loss. Five intervals leave time
    # for the verdict to reach all processes.
    _watch.stopped.wait(_watch.timeout + 5 * _watch.interval)


class _Watch:
  """The watchdog thread of one process."""

  def __init__(self, client: Any, index: int, count: int, timeout: float):
    self.timeout = timeout
    self.interval = min(timeout / _BEATS_PER_TIMEOUT, _MAX_INTERVAL)
    self.stopped = threading.Event()
    self._client = client
    self._index = index
    self._count = count
    self._beat = 0
    self._seen = {}  # Process -> (its last beat, when it came).
    self._ending = False
    self._on_abort = _catch_abort(self._abort)
    threading.Thread(target=self._run, name='peers', daemon=True).start()

  def tell(self, code: int, says: str) -> None:
    """Writes this process's notice; see the function `tell`."""
    self._ending = True
    notice = {'process': self._index, 'code': code, 'says': says}
    try:
      self._set(f'{_NOTICES}{self._index}', notice)
      # Process 0 hosts the store, so it stays until the others have read it.
      if self._index == 0:
        self._set(_VERDICT, notice)
        self._wait_for_others()
    except RuntimeError:
      pass  # The store is gone, so no process can read the notice.

  def _wait_for_others(self) -> None:
    """Waits until all processes gave notice, but not more than 3 intervals."""
    deadline = time.monotonic() + 3 * self.interval
    while time.monotonic() < deadline:
      if len(self._client.key_value_dir_get(_NOTICES)) == self._count:
        return
      time.sleep(self.interval / 10)

  def _run(self) -> None:
    """Runs the thread: one step per interval until the run ends."""
    while not self.stopped.wait(self.interval):
      if self._ending:
        return
      try:
        self._step()
      except RuntimeError:
        # The store does not answer. jaxlib notices it and raises SIGABRT, which
        # calls `_abort`.
        continue

  def _step(self) -> None:
    """Sends a heartbeat, and ends this process if there is a verdict."""
    self._beat += 1
    self._set(f'{_BEATS}{self._index}', self._beat)
    if self._index == 0:
      self._judge()
    try:
      verdict = json.loads(self._client.key_value_try_get(_VERDICT))
    except RuntimeError:
      return  # There is none yet.
    if verdict['process'] != self._index and not self._ending:
      self._end(verdict)

  def _judge(self) -> None:
    """Writes a verdict if a process gave notice or stopped its heartbeats."""
    for _, notice in sorted(self._client.key_value_dir_get(_NOTICES)):
      self._conclude(json.loads(notice))
    now = time.monotonic()
    beats = {
      int(key.rpartition('/')[2]): beat
      for key, beat in self._client.key_value_dir_get(_BEATS)
    }
    for i in range(self._count):
      if i not in self._seen or self._seen[i][0] != beats.get(i):
        self._seen[i] = beats.get(i), now
      # Three intervals before the timeout, so that the verdict spreads in time.
      elif now - self._seen[i][1] > self.timeout - 3 * self.interval:
        self._conclude(_lost(i))

  def _conclude(self, verdict: dict[str, Any]) -> None:
    """Publishes the verdict, waits for the others and ends process 0."""
    if self._ending:
      return
    self._ending = True
    self._set(_VERDICT, verdict)
    self._set(f'{_NOTICES}0', verdict)
    self._wait_for_others()
    self._end(verdict)

  def _end(self, verdict: dict[str, Any]) -> None:
    """Ends this process with the exit code and message of the verdict."""
    self._ending = True
    if self._index:
      self._set(f'{_NOTICES}{self._index}', verdict)
    code = verdict['code']
    if code not in (errors.UserError.exit_code, errors.Stopped.exit_code):
      code = errors.RunError.exit_code
    _exit(code, f'process {verdict["process"]}: {verdict["says"]}')

  def _set(self, key: str, value: Any) -> None:
    """Writes a JSON value to the store of jax.distributed."""
    self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

  def _abort(self, number: int) -> None:
    """Handles the SIGABRT of jaxlib: process 0 and its store are gone."""
    del number
    if self._ending or self.stopped.is_set():
      os._exit(errors.RunError.exit_code)
    self._ending = True
    lost = _lost(0)
    _exit(errors.RunError.exit_code, f'process 0: {lost["says"]}')


def _lost(process: int) -> dict[str, Any]:
  """Returns the verdict for a process that is lost."""
  return {
    'process': process,
    'code': errors.RunError.exit_code,
    'says': 'lost (it was killed, or its host does not answer); run the same '
    'command in all processes to continue',
  }


def _exit(code: int, line: str) -> None:
  """Prints an error line and ends the process from any thread."""
  os.write(2, terminal.eraser() + f'error: {line}\n'.encode())
  os._exit(code)


def _catch_abort(handle: Any) -> Any:
  """Installs `handle` as the C handler of SIGABRT.

  It runs in the thread that aborts. A Python signal handler would run in the
  main thread, which may wait forever.

  Returns:
    The C callback; the caller must keep a reference to it.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
  return handler  # Freed callbacks crash the process when they are called.
