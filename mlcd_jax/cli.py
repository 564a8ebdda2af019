"""What every command shares: flags, logging, and errors as one line."""

from collections.abc import Callable
from collections.abc import Sequence
import logging
import os
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging as absl_logging

from mlcd_jax import errors


def run(main: Callable[[Sequence[str]], None], *, required: Sequence[str]):
  """Runs a command and exits: 0, or as `errors` says.

  Args:
    main: takes the arguments that are not flags.
    required: flags that must be given.
  """

  def parse(argv):
    rest = _parse(argv)
    for name in required:
      if flags.FLAGS[name].value is None:
        raise errors.UserError(f'--{name} is missing; see --help')
    return rest

  def start(argv):
    absl_logging.set_verbosity(absl_logging.WARNING)
    main(argv[1:])

  _log_to_stderr()
  try:
    app.run(start, flags_parser=parse)
  except (errors.UserError, errors.RunError, errors.Stopped) as e:
    print(f'error: {e}', file=sys.stderr, flush=True)
    # Threads and processes of a broken run must not hold the exit up.
    os._exit(e.exit_code)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Parses the flags; a mistake in them becomes a UserError."""
  _check_config_exists(argv)
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as e:
    raise _unknown_field(argv, e) from e
  except (flags.Error, TypeError, ValueError) as e:
    raise _as_user_error(e) from e


def _check_config_exists(argv: Sequence[str]) -> None:
  """A wrong --config lists the right ones."""
  for arg, following in zip(argv[1:], [*argv[2:], '']):
    name, equals, value = arg.lstrip('-').partition('=')
    if name != 'config':
      continue
    value = value if equals else following
    if not pathlib.Path(value.partition(':')[0]).is_file():
      known = sorted(map(str, pathlib.Path('configs').glob('*.py')))
      raise errors.UserError(
        f'--config={value}: no such file; there are ' + ', '.join(known)
      )


def _unknown_field(argv: Sequence[str], e: Exception) -> errors.UserError:
  """Names the whole flag whose last part is no config field."""
  while isinstance(e.args[0], Exception):
    e = e.args[0]
  said = ' '.join(str(e.args[0]).split())
  name = said.split("'")[1]
  flag = next(
    (a for a in argv if name in a.partition('=')[0].split('.')), '--config'
  )
  return errors.UserError(f'{flag}: the config has no field {said}')


def _as_user_error(e: Exception) -> errors.UserError:
  """The innermost explanation of a flag that could not be parsed."""
  cause = e
  while cause is not None:
    if isinstance(cause, errors.UserError):
      return cause
    cause = cause.__cause__ or cause.__context__
  lines = [line.strip() for line in str(e).splitlines() if line.strip()]
  return errors.UserError(' '.join(lines) or type(e).__name__)


def _log_to_stderr() -> None:
  """The project's own lines; of its libraries only warnings."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  log = logging.getLogger('mlcd_jax')
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  log.propagate = False
