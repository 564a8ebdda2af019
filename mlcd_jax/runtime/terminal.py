"""Terminal output: log lines above one live line, each warning only once."""

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

# Parts of warnings that are never shown. Orbax gives the first for every
# checkpoint that is read without a manager. TFDS gives the second for a data
# set that is not prepared, which ends in an error of its own.
_NOISE = ('Metadata file does not exist', 'has no dataset_info.json')

_LINE = live.Live(
  console=console.Console(stderr=True, soft_wrap=True),
  auto_refresh=False,
  transient=True,
  redirect_stdout=False,  # stdout may be a file.
)


def is_interactive() -> bool:
  """Returns whether stderr is a terminal that can rewrite a line."""
  return sys.stderr.isatty() and _LINE.console.is_interactive


def show(stage: str, done: int, total: int, text: str) -> None:
  """Replaces the live line.

  Args:
    stage: the name at the beginning of the line.
    done: the number of units done.
    total: the number of units in all.
    text: the text behind the bar.
  """
  line = table.Table.grid(padding=(0, 1))
  line.add_row(
    rich_text.Text(stage, no_wrap=True),
    progress_bar.ProgressBar(total, done, width=_BAR_WIDTH),
    rich_text.Text(text, no_wrap=True, overflow='ellipsis'),
  )
  if not _LINE.is_started:
    _LINE.start()
    # rich hides the cursor, and a killed process could not show it again.
    _LINE.console.show_cursor(True)
  # The terminal echoes ^C at the end of the line; it must not wrap.
  width = _LINE.console.width - len('^C')
  _LINE.update(constrain.Constrain(line, width), refresh=True)


def clear() -> None:
  """Removes the live line."""
  _LINE.stop()


def eraser() -> bytes:
  """Returns the bytes that erase the live line; b'' if there is none.

  Signal handlers need them, because they write to the descriptor of stderr.
  """
  return b'\r\x1b[2K' if _LINE.is_started else b''


def log_to_stderr() -> None:
  """Logs to stderr: this project's messages and the libraries' warnings.

  Call it inside absl's app, since it replaces the log handler of absl.
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
  """A log handler that writes above the live line.

  It looks up sys.stderr for each line, because rich replaces sys.stderr while
  the live line is shown.
  """

  def __init__(self):
    logging.Handler.__init__(self)

  @property
  def stream(self):
    """The present sys.stderr, to which the next line goes."""
    return sys.stderr


class _Once(logging.Filter):
  """A log filter that drops repeated warnings and those in _NOISE."""

  def __init__(self):
    super().__init__()
    self._seen = set()

  def filter(self, record: logging.LogRecord) -> bool:
    """Returns whether to log a record."""
    message = record.getMessage()
    if record.levelno != logging.WARNING:
      return True
    if message in self._seen or any(noise in message for noise in _NOISE):
      return False
    self._seen.add(message)
    return True


def _show_warning(message, category, *where) -> None:
  """Logs a warning of Python's `warnings` module as one line."""
  del where
  logging.getLogger('py.warnings').warning('%s: %s', category.__name__, message)
