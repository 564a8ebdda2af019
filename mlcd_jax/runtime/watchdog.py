"""What the processes of a run tell each other: alive, stopped, failed.

Every process beats into the key-value store of jax.distributed. Process 0
watches, and writes one verdict when a process is lost or says that it ends
early; all read it and end with the same exit code and a line that names the
process. jaxlib by itself aborts with a stack trace that names nobody.
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

_STATUS = re.compile('[A-Z_]+: ')

# Beats in a heartbeat timeout, and seconds between two at most.
_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL = 2.0

_watch: '_Watch | None' = None


def start(client: Any, index: int, count: int, timeout: float) -> None:
  """Begins to beat and to watch, in a thread.

  Args:
    client: of jax.distributed.
    index: of this process.
    count: of processes.
    timeout: seconds without a beat after which a process is lost.
  """
  global _watch
  _watch = _Watch(client, index, count, timeout)


def started() -> bool:
  """Whether there are others."""
  return _watch is not None


def stop() -> None:
  """Ends the thread; call where all processes are done."""
  global _watch
  if _watch is not None:
    _watch.stopped.set()
    _watch = None


def tell(code: int, says: str) -> None:
  """Lets the others end as this process is about to.

  Args:
    code: the exit code; a bug here is a lost process to the others.
    says: one line.
  """
  if _watch is not None:
    _watch.tell(code, says)


def may_be_lost(e: Exception) -> bool:
  """Whether an error may be what the loss of another process looks like.

  XLA's are RuntimeErrors, or where a program runs in the thread that calls it
  ValueErrors; both begin with the name of a status, such as UNKNOWN.
  """
  return started() and (
    isinstance(e, RuntimeError) or bool(_STATUS.match(str(e)))
  )


def wait() -> None:
  """Waits as long as a verdict may take, and does not return if one comes.

  For errors that a lost process may have caused, such as a broken connection.
  """
  if _watch is not None:
    _watch.stopped.wait(_watch.timeout + 5 * _watch.interval)


class _Watch:
  """The state of one process's thread."""

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
    """See `tell`."""
    self._ending = True
    notice = {'process': self._index, 'code': code, 'says': says}
    try:
      self._set(f'{_NOTICES}{self._index}', notice)
      if self._index == 0:  # The store lives here: stay until all know.
        self._set(_VERDICT, notice)
        self._wait_for_others()
    except RuntimeError:
      pass  # Nobody is left to hear it.

  def _wait_for_others(self) -> None:
    deadline = time.monotonic() + 3 * self.interval
    while time.monotonic() < deadline:
      if len(self._client.key_value_dir_get(_NOTICES)) == self._count:
        return
      time.sleep(self.interval / 10)

  def _run(self) -> None:
    while not self.stopped.wait(self.interval):
      if self._ending:
        return
      try:
        self._step()
      except RuntimeError:
        continue  # No answer: jaxlib notices, and calls `_abort`.

  def _step(self) -> None:
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
    """Writes a verdict if a process said something or said nothing."""
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
      # Some beats earlier than jaxlib, which aborts.
      elif now - self._seen[i][1] > self.timeout - 3 * self.interval:
        self._conclude(_lost(i))

  def _conclude(self, verdict: dict[str, Any]) -> None:
    if self._ending:
      return
    self._ending = True
    self._set(_VERDICT, verdict)
    self._set(f'{_NOTICES}0', verdict)
    self._wait_for_others()
    self._end(verdict)

  def _end(self, verdict: dict[str, Any]) -> None:
    """Ends this process as another one did."""
    self._ending = True
    if self._index:
      self._set(f'{_NOTICES}{self._index}', verdict)
    code = verdict['code']
    if code not in (errors.UserError.exit_code, errors.Stopped.exit_code):
      code = errors.RunError.exit_code
    _exit(code, f'process {verdict["process"]}: {verdict["says"]}')

  def _set(self, key: str, value: Any) -> None:
    self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

  def _abort(self, number: int) -> None:
    """The end that jaxlib brings where process 0, and its store, is gone."""
    del number
    if self._ending or self.stopped.is_set():
      os._exit(errors.RunError.exit_code)
    self._ending = True
    lost = _lost(0)
    _exit(errors.RunError.exit_code, f'process 0: {lost["says"]}')


def _lost(process: int) -> dict[str, Any]:
  return {
    'process': process,
    'code': errors.RunError.exit_code,
    'says': 'lost (it was killed, or its host does not answer); run the same '
    'command in all processes to continue',
  }


def _exit(code: int, line: str) -> None:
  os.write(2, terminal.eraser() + f'error: {line}\n'.encode())
  os._exit(code)


def _catch_abort(handle: Any) -> Any:
  """Lets `handle` end the process on SIGABRT, in whatever thread.

  Python's own handlers run in the main thread, which may never come back.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
  return handler  # Must live as long as it may be called.
