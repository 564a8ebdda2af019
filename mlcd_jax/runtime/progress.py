"""The progress line of a stage."""

import datetime
import logging
import time

from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import terminal

_log = logging.getLogger(__name__)


class Progress:
  """One line per stage: how far, how fast, how long still.

  On a terminal it is the live line, and a line of the log at the end;
  elsewhere one of the log every ten seconds too.
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
    """Begins to count.

    Args:
      stage: its name.
      total: of the units.
      unit: plural.
      done: units that are there from the start.
      flops: of one unit, shown a second where it is not 0.
      peak_flops: a second, of all devices, where it is known.
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
    self._interval = 0.2 if self._live else 10.0
    self._last = self._start
    if self._live:
      terminal.show(stage, done, total, f'{done}/{total}')

  def update(self, done: int, **values: float) -> None:
    """Shows `done` of the total, with some values beside it."""
    now = time.monotonic()
    finished = done >= self._total
    if not distributed.is_main():
      return
    if not self._begun and not finished:
      # What compiles comes with the first and says nothing of the rest.
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
    """FLOPs a second, and what share of the peak they are."""
    if not self._flops:
      return ''
    flops = rate * self._flops
    share = ''
    if self._peak_flops:
      share = f' ({flops / self._peak_flops:.0%} of peak)'
    return f' {flops / 1e12:.3g} TFLOP/s{share}'
