"""The terminal: log lines above one live line, and every warning once."""

import logging
import sys
import warnings

from absl import logging as absl_logging
from rich import console
from rich import constrain
from rich import live
from rich import progress_bar
from rich import table
from rich import text as rich_text

_BAR_WIDTH = 20

# Orbax' of every checkpoint that is read without its manager; and TFDS' of a
# data set that is not prepared, which is an error then.
_NOISE = ('Metadata file does not exist', 'has no dataset_info.json')

_LINE = live.Live(
  console=console.Console(stderr=True, soft_wrap=True),
  auto_refresh=False,
  transient=True,
  redirect_stdout=False,  # It may be a file.
)


def is_interactive() -> bool:
  """Whether stderr is a terminal on which a line can be rewritten."""
  return sys.stderr.isatty() and _LINE.console.is_interactive


def show(stage: str, done: int, total: int, text: str) -> None:
  """Shows the live line, instead of the one before.

  Args:
    stage: what it is about.
    done: of the total.
    total: in any unit.
    text: behind the bar.
  """
  line = table.Table.grid(padding=(0, 1))
  line.add_row(
    rich_text.Text(stage, no_wrap=True),
    progress_bar.ProgressBar(total, done, width=_BAR_WIDTH),
    rich_text.Text(text, no_wrap=True, overflow='ellipsis'),
  )
  if not _LINE.is_started:
    _LINE.start()
    # A process that is killed could not give it back.
    _LINE.console.show_cursor(True)
  width = _LINE.console.width - len('^C')  # Which must not begin a new line.
  _LINE.update(constrain.Constrain(line, width), refresh=True)


def clear() -> None:
  """Removes the live line."""
  _LINE.stop()


def eraser() -> bytes:
  """What removes it, for those who write to stderr's descriptor themselves."""
  return b'\r\x1b[2K' if _LINE.is_started else b''


def log_to_stderr() -> None:
  """Shows the project's own lines, and of its libraries the warnings.

  Called from within absl's app, whose own handler this replaces.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.root.removeHandler(absl_logging.get_absl_handler())
  handler = _Handler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_Once())
  logging.root.addHandler(handler)
  logging.getLogger('mlcd_jax').setLevel(logging.INFO)
  warnings.showwarning = _show_warning


class _Handler(logging.StreamHandler):
  """Writes to what stderr is now: while there is a live line, above it."""

  def __init__(self):
    logging.Handler.__init__(self)

  @property
  def stream(self):
    return sys.stderr


class _Once(logging.Filter):
  """Lets a warning through the first time, and some never."""

  def __init__(self):
    super().__init__()
    self._seen = set()

  def filter(self, record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if record.levelno != logging.WARNING:
      return True
    if message in self._seen or any(noise in message for noise in _NOISE):
      return False
    self._seen.add(message)
    return True


def _show_warning(message, category, *where) -> None:
  """Python's warnings, as a line of the log."""
  del where
  logging.getLogger('py.warnings').warning('%s: %s', category.__name__, message)
