"""What people see: a live line on a terminal only, and warnings once."""

import os
import re
import subprocess
import sys

from tests import commands

_START = """
import logging, warnings
from absl import logging as absl_logging
from mlcd_jax.runtime import terminal
absl_logging.use_absl_handler()  # As absl's app does.
terminal.log_to_stderr()
log = logging.getLogger('mlcd_jax.x')
"""
_LIVE = """
assert terminal.is_interactive()
terminal.show('embed', 1, 4, 'a line of [b]300[/b] ' + 'x' * 300)
log.info('said [i]meanwhile')
terminal.show('embed', 2, 4, '2/4')
"""
_UP_AND_ERASED = '\x1b[1A\x1b[2K'


def on_terminal(script, **env):
  """What a script writes to stderr where that is a terminal."""
  ours, its = os.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', _START + script],
    cwd=commands.ROOT,
    env=os.environ | {'TERM': 'xterm', 'COLUMNS': '60'} | env,
    stdout=subprocess.DEVNULL,
    stderr=its,
  )
  os.close(its)
  out = b''
  try:
    while part := os.read(ours, 4096):
      out += part
  except OSError:
    pass  # The other end is closed.
  assert process.wait() == 0, out.decode()
  return re.sub(r'\x1b\[[\d;]*m', '', out.decode())


def test_log_lines_stand_above_the_live_line():
  out = on_terminal(_LIVE + 'terminal.clear(); log.info("done")')
  assert re.search(r'\x1b\[2K\d\d:\d\d:\d\d said \[i\]meanwhile\r\n', out)
  shown = re.search(r'embed \S+ (a line of \[b\]300\[/b\] x+…)', out)
  assert len(shown[0]) == 58  # One line, however narrow.
  rest = out[out.rindex(_UP_AND_ERASED) :]
  assert 'done' in rest and 'embed' not in rest
  assert out.index('\x1b[?25l') < out.index('\x1b[?25h') < out.index('embed')


def test_what_ends_the_process_erases_the_line():
  out = on_terminal(
    _LIVE
    + 'import os; os.write(2, terminal.eraser() + b"error: x"); os._exit(0)'
  )
  assert out.endswith('2/4\r\x1b[2Kerror: x')
  assert on_terminal('assert not terminal.eraser()') == ''


def test_a_terminal_that_rewrites_no_line_gets_none():
  assert on_terminal('assert not terminal.is_interactive()', TERM='dumb') == ''


def test_warnings_come_once_and_plain_where_there_is_no_terminal():
  script = """
assert not terminal.is_interactive()
warnings.simplefilter('always')
for i in range(3):
  warnings.warn('from Python')
  log.warning('ours: %d', i // 2)
  log.info('progress')
  logging.getLogger('library').info('hidden')
  logging.getLogger('library').warning('of a library')
  absl_logging.warning('of absl')
  absl_logging.warning('Metadata file does not exist: x')
"""
  done = subprocess.run(
    [sys.executable, '-c', _START + script],
    cwd=commands.ROOT,
    env=os.environ | {'FORCE_COLOR': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  lines = [re.sub(r'^\d\d:\d\d:\d\d ', '', x) for x in done.stderr.splitlines()]
  assert lines == [
    'UserWarning: from Python',
    'ours: 0',
    'progress',
    'of a library',
    'of absl',
    'progress',
    'ours: 1',
    'progress',
  ]
