"""What every command shares: flags, logging, and errors as one line."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import os
import pathlib
import resource
import sys
import traceback

from absl import app
from absl import flags

from mlcd_jax import errors
from mlcd_jax import interrupt
from mlcd_jax import peers
from mlcd_jax import terminal


def run(main: Callable[[Sequence[str]], None], *, required: Sequence[str]):
  """Runs a command and exits: 0, or as `errors` says.

  Args:
    main: takes the arguments that are not flags.
    required: flags that must be given.
  """

  def parse(argv):
    rest = _parse(argv)
    for name in required:
      if flags.FLAGS[name].value in (None, ''):
        raise errors.UserError(f'--{name} is missing; see --help')
    return rest

  def start(argv):
    terminal.log_to_stderr()
    _allow_open_files()
    try:
      main(argv[1:])
    finally:
      terminal.clear()

  try:
    with interrupt.exiting():
      app.run(start, flags_parser=parse)
  except (errors.UserError, errors.RunError, errors.Stopped) as e:
    _exit(e)
  except OSError as e:
    if e.filename is None and e.errno not in errors.DISK_FULL:
      raise
    full = e.errno in errors.DISK_FULL
    kind = errors.RunError if full else errors.UserError
    _exit(kind(f'{e.filename or "the disk"}: {e.strerror}'))
  except Exception as e:
    if not peers.started():
      raise
    if peers.may_be_lost(e):
      peers.wait()  # A lost process breaks connections: it gets the blame.
    traceback.print_exc()
    peers.tell(1, f'ended by a bug ({type(e).__name__}); see its output')
    os._exit(1)


def _allow_open_files() -> None:
  """Raises the limit of open files as far as it goes, for workers too."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  # macOS has no hard limit and yet refuses more than OPEN_MAX.
  for limit in (most, 10_240):
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
      return


def _exit(e: BaseException) -> None:
  """Says what happened in one line and ends the process."""
  line = ' '.join(str(e).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  peers.tell(e.exit_code, line)
  # Threads and processes of a broken run must not hold the exit up.
  os._exit(e.exit_code)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Parses the flags; a mistake in them becomes a UserError."""
  path = _config_path(argv)
  try:
    return flags.FLAGS(argv)
  except errors.UserError:
    raise
  except flags.Error as e:
    raise _as_user_error(e) from e
  except Exception as e:  # The config file is the user's code.
    raise _from_config_file(argv, path, e) from e


def _config_path(argv: Sequence[str]) -> str:
  """The file that --config names; a wrong name lists the right ones."""
  for arg, following in zip(argv[1:], [*argv[2:], '']):
    name, equals, value = arg.lstrip('-').partition('=')
    if name != 'config':
      continue
    value = value if equals else following
    path = value.partition(':')[0]
    if not pathlib.Path(path).is_file():
      known = sorted(map(str, pathlib.Path('configs').glob('*.py')))
      raise errors.UserError(
        f'--config={value}: no such file; there are ' + ', '.join(known)
      )
    return path
  return ''


def _from_config_file(
  argv: Sequence[str], path: str, e: Exception
) -> errors.UserError:
  """An unknown field, named whole, or what the config file itself did."""
  while e.args and isinstance(e.args[0], Exception):
    e = e.args[0]
  said = ' '.join(str(e.args[0] if e.args else e).split())
  for flag in argv:
    fields = flag.partition('=')[0].split('.')[1:]
    if isinstance(e, KeyError) and any(f"'{f}'" in said for f in fields):
      return errors.UserError(f'{flag}: the config has no field {said}')
  return errors.UserError(
    f'--config={path}: the file fails with {type(e).__name__}: {said}'
  )


def _as_user_error(e: Exception) -> errors.UserError:
  """The innermost explanation of a flag that could not be parsed."""
  cause = e
  while cause is not None:
    if isinstance(cause, errors.UserError):
      return cause
    cause = cause.__cause__ or cause.__context__
  lines = [line.strip() for line in str(e).splitlines() if line.strip()]
  return errors.UserError(' '.join(lines) or type(e).__name__)
