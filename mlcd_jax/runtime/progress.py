"""A progress line for a stage, live or in the log."""

import datetime
import logging
import time

from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import terminal

_log = logging.getLogger(__name__)


class Progress:
  """A progress line with the count, the speed and the time left.

  On a terminal it is the live line, followed by a log line at the end.
  Elsewhere it is a log line every ten seconds.
  """

  def __init__(
    self,
    stage: str,
    total: int,
    *,
    unit: str,
    done: int = 0,
    flops: float = 0,
    peak_flops: float | None = None,
  ):
    """Starts the progress line.

    Args:
      stage: the name of the stage.
      total: the number of units to do.
      unit: the name of the units, in the plural.
      done: the number of units done before the start.
      flops: the FLOPs of one unit; 0 hides the FLOP/s.
      peak_flops: the peak FLOP/s of all devices, or None if unknown.
    """
    self._flops = flops
    self._peak_flops = peak_flops
    self._stage = stage
    self._total = total
    self._unit = unit
    self._first = done
    self._start = time.monotonic()
    self._begun = False
    self._live = distributed.is_main() and terminal.is_interactive()
    # Seconds between two lines: often on a terminal, seldom in a log file.
    self._interval = 0.2 if self._live else 10.0
    self._last = self._start
    if self._live:
      terminal.show(stage, done, total, f'{done}/{total}')

  def update(self, done: int, **values: float) -> None:
    """Shows the progress.

    Args:
      done: the number of units done.
      **values: numbers to show beside the progress, by name.
    """
    now = time.monotonic()
    finished = done >= self._total
    if not distributed.is_main():
      return
    if not self._begun and not finished:
      # The first update includes the compilation, so the speed is measured
      # from here on.
      self._begun, self._first, self._start = True, done, now
      return
    if now - self._last < self._interval and not finished:
      return
    self._last = now
    rate = (done - self._first) / max(now - self._start, 1e-9)
    left = round((self._total - done) / rate) if rate else 0
    eta = datetime.timedelta(seconds=left) if rate else '?'
    took = f'in {now - self._start:.0f} s' if finished else f'ETA {eta}'
    shown = ''.join(f'{k} {v:.4g} ' for k, v in values.items())
    text = (
      f'{done}/{self._total} {took} {shown}'
      f'{rate:.4g} {self._unit}/s{self._speed(rate)}'
    )
    if finished:
      terminal.clear()
    if self._live and not finished:
      terminal.show(self._stage, done, self._total, text)
    else:
      _log.info('%s %s', self._stage, text)

  def _speed(self, rate: float) -> str:
    """Returns the TFLOP/s and their share of the peak as text."""
    if not self._flops:
      return ''
    flops = rate * self._flops
    share = ''
    if self._peak_flops:
      share = f' ({flops / self._peak_flops:.0%} of peak)'
    return f' {flops / 1e12:.3g} TFLOP/s{share}'
