"""Where numbers go: metrics.jsonl, TensorBoard and the progress line."""

from collections.abc import Mapping
import json
import logging
import pathlib
import sys
import time

import tensorboardX

from mlcd_jax import distributed
from mlcd_jax import files

_log = logging.getLogger(__name__)


class Writer:
  """Writes scalars to metrics.jsonl and tensorboard/, on one process."""

  def __init__(self, workdir: pathlib.Path, *, first_step: int):
    """Opens both; what an earlier invocation wrote from `first_step` on goes.

    Args:
      workdir: the run's folder.
      first_step: the step this invocation starts with.
    """
    self._file = self._board = None
    self._latest = {}
    if not distributed.is_main():
      return
    path = workdir / 'metrics.jsonl'
    _drop_from(path, first_step)
    self._file = open(path, 'a', buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=first_step, write_to_disk=True
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line and one point a value."""
    self._latest.update(values)
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def latest(self) -> dict[str, float]:
    """The last value of every metric since this was asked before."""
    latest, self._latest = self._latest, {}
    return latest

  def close(self) -> None:
    """Flushes both."""
    if self._file is not None:
      self._file.close()
      self._board.close()


class Progress:
  """One line per stage: how far, how fast, how long still.

  On a terminal the line is rewritten; elsewhere a new one comes every ten
  seconds, and at the end.
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
    self._terminal = sys.stderr.isatty()
    self._interval = 0.2 if self._terminal else 10.0
    self._last = self._start

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
    left = (self._total - done) / rate if rate else float('inf')
    shown = ' '.join(f'{k} {v:.4g}' for k, v in values.items())
    line = (
      f'{self._stage} {done}/{self._total} {shown}{" " * bool(shown)}'
      f'{rate:.4g} {self._unit}/s {self._speed(rate)}'
      + (f'in {now - self._start:.0f} s' if finished else f'ETA {_time(left)}')
    )
    if self._terminal:
      sys.stderr.write(f'\r{line}\x1b[K' + '\n' * finished)
      sys.stderr.flush()
    else:
      _log.info(line)

  def _speed(self, rate: float) -> str:
    """FLOPs a second, and what share of the peak they are."""
    if not self._flops:
      return ''
    flops = rate * self._flops
    share = ''
    if self._peak_flops:
      share = f' ({flops / self._peak_flops:.0%} of peak)'
    return f'{flops / 1e12:.3g} TFLOP/s{share} '


def _time(seconds: float) -> str:
  """1:02:03, or '?' before there is a rate."""
  if seconds == float('inf'):
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def _drop_from(path: pathlib.Path, first_step: int) -> None:
  """Drops the lines of steps that will be written again."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] < first_step:
        kept.append(line + '\n')
    except (json.JSONDecodeError, KeyError, TypeError):
      continue  # A line cut short by a kill.
  with files.atomic(path) as temporary:
    temporary.write_text(''.join(kept))
