"""The shared entry point of all commands: flags, logging and error lines."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import difflib
import logging
import os
import pathlib
import re
import resource
import sys
import traceback

from absl import app
from absl import flags
from ml_collections import config_flags

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import signals
from mlcd_jax.runtime import terminal
from mlcd_jax.runtime import watchdog

_log = logging.getLogger(__name__)

_HELP = ('help', 'helpshort', 'helpfull', 'h', '?')
_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def run(
  main: Callable[[Sequence[str]], None],
  *,
  required: Sequence[str],
  fields: Sequence[str] = (),
):
  """Runs a command and exits with 0 or with the exit code of its error.

  Args:
    main: the command; it takes the arguments that are not flags.
    required: the names of the flags that must be given.
    fields: the dotted names of all config fields; an error about an unknown
      field proposes the closest ones.
  """

  def parse(argv):
    rest = _parse(argv, fields)
    for name in required:
      if flags.FLAGS[name].value in (None, ''):
        raise _missing(name, rest[1:])
    return rest

  def start(argv):
    terminal.log_to_stderr()
    _allow_open_files()
    try:
      main(argv[1:])
    finally:
      terminal.clear()

  try:
    with signals.exiting():
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
    if not watchdog.started():
      raise
    if watchdog.may_be_lost(e):
      # A lost process breaks the connections of the others. Its loss is the
      # error to report, so its verdict gets time to arrive.
      watchdog.wait()
    traceback.print_exc()
    watchdog.tell(1, f'ended by a bug ({type(e).__name__}); see its output')
    os._exit(1)


def workdir() -> pathlib.Path:
  """Returns the folder that --workdir names.

  Without the flag it is runs/ followed by the name of the config and preset,
  and a log line names it.

  Raises:
    UserError: --workdir is an empty string or a URL.
  """
  given = flags.FLAGS.workdir
  if given == '':
    raise errors.UserError(
      '--workdir is empty; name a folder, or leave it out for one in runs/'
    )
  if given is not None:
    if '://' in given:
      # A run appends to files, renames them, locks them and maps them into
      # memory; object stores do none of these.
      raise errors.UserError(
        f'--workdir={given}: object stores hold images and embeddings, not a '
        'workdir; name a folder, on a disk or a file system that is mounted'
      )
    return paths.local(given, '--workdir')
  path, _, preset = config_flags.get_config_filename(
    flags.FLAGS['config']
  ).partition(':')
  name = '_'.join(filter(None, (pathlib.Path(path).stem, preset)))
  # launch/restart.sh derives the same name; change both together.
  folder = pathlib.Path('runs', re.sub(r'[^A-Za-z0-9._-]', '_', name))
  _log.info('workdir: %s (--workdir=DIR for another one)', folder)
  return folder


def _allow_open_files() -> None:
  """Raises the limit of open files to the largest value allowed.

  Worker processes inherit the limit.
  """
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  # macOS reports no hard limit but refuses more than OPEN_MAX, 10,240.
  for limit in (most, 10_240):
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
      return


def _exit(e: BaseException) -> None:
  """Prints the error as one line, tells the other processes, and exits."""
  line = ' '.join(str(e).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  watchdog.tell(e.exit_code, line)
  # sys.exit would wait for the run's threads and worker processes, which may
  # hang after an error.
  os._exit(e.exit_code)


def _parse(argv: Sequence[str], fields: Sequence[str]) -> Sequence[str]:
  """Parses the flags.

  Args:
    argv: the command line, the program's name first.
    fields: the dotted names of all config fields.

  Returns:
    The program's name and the arguments that are not flags.

  Raises:
    UserError: a flag is wrong, or the config file fails.
  """
  argv = ['--help' if arg == '-h' else arg for arg in argv]
  # A shell does not expand ~ in the middle of an argument.
  argv = [
    f'--config={paths.expand(arg.removeprefix("--config="))}'
    if arg.startswith('--config=~')
    else arg
    for arg in argv
  ]
  path = _config_path(argv)
  try:
    return flags.FLAGS(argv)
  except errors.UserError:
    raise
  except SystemExit as e:
    if any(a.startswith('-') and a.lstrip('-') in _HELP for a in argv):
      raise SystemExit(0) from e  # absl exits with 1 after its help.
    raise
  except flags.Error as e:
    raise _as_user_error(e, argv, fields) from e
  except Exception as e:  # The config file is the user's code.
    raise _from_config_file(argv, path, e, fields) from e


def _missing(name: str, rest: Sequence[str]) -> errors.UserError:
  """Returns the error for a required flag that is missing.

  Args:
    name: the flag.
    rest: the arguments that are not flags; a Python file among them is
      probably the config.
  """
  if name != 'config':
    return errors.UserError(f'--{name} is missing: {flags.FLAGS[name].help}')
  files = [arg for arg in rest if arg[0:1] != '-' and '.py' in arg]
  way_out = f'write --config={files[0]}' if files else _configs()
  return errors.UserError(f'--config is missing; {way_out}')


def _config_path(argv: Sequence[str]) -> str:
  """Returns the file that --config names, or '' if the flag is not given.

  Raises:
    UserError: the file does not exist or is not Python; the message lists the
      configs that exist.
  """
  for arg, following in zip(argv[1:], [*argv[2:], '']):
    name, equals, value = arg.lstrip('-').partition('=')
    if name != 'config':
      continue
    value = value if equals else following
    path = value.partition(':')[0]
    if pathlib.Path(path).is_file() and path.endswith('.py'):
      return path
    kind = 'not a Python file' if os.path.exists(path) else 'no such file'
    raise errors.UserError(f'--config={value}: {kind}; {_configs(value)}')
  return ''


def _configs(value: str = '') -> str:
  """Returns a list of the configs, with the one closest to `value` first."""
  here = pathlib.Path.cwd()
  known = {
    p.stem: str(p.relative_to(here) if p.is_relative_to(here) else p)
    for p in sorted(_CONFIGS.glob('*.py'))
  }
  if not known:
    return 'name a Python file that has get_config()'
  path, colon, preset = value.partition(':')
  close = difflib.get_close_matches(pathlib.Path(path).stem, known, 1)
  meant = f'did you mean {known[close[0]]}{colon}{preset}? ' if close else ''
  return f'{meant}there are {", ".join(known.values())}'


def _from_config_file(
  argv: Sequence[str], path: str, e: Exception, known: Sequence[str]
) -> errors.UserError:
  """Returns the error for a config that could not be built.

  Args:
    argv: the command line.
    path: the config file.
    e: the error that absl raised.
    known: the dotted names of all config fields.

  Returns:
    An error that names the flag with an unknown field, or else the exception
    that the config file raised.
  """
  # ml_collections puts the original error into the arguments of its own.
  while e.args and isinstance(e.args[0], Exception):
    e = e.args[0]
  said = ' '.join(str(e.args[0] if e.args else e).split())
  for flag in argv:
    fields = flag.partition('=')[0].split('.')[1:]
    if isinstance(e, KeyError) and any(f"'{f}'" in said for f in fields):
      said = said.replace("' Did", "'. Did")
      if 'Did you mean' not in said:
        said += f'; {_fields(fields[-1], known)}'
      return errors.UserError(f'{flag}: the config has no field {said}')
  return errors.UserError(
    f'--config={path}: the file fails with {type(e).__name__}: {said}'
  )


def _as_user_error(
  e: Exception, argv: Sequence[str], known: Sequence[str]
) -> errors.UserError:
  """Returns a UserError for a flag that could not be parsed.

  It is the UserError in the chain of causes if there is one, and absl's
  message otherwise.
  """
  cause = e
  while cause is not None:
    if isinstance(cause, errors.UserError):
      return cause
    cause = cause.__cause__ or cause.__context__
  lines = [line.strip() for line in str(e).splitlines() if line.strip()]
  said = ' '.join(lines) or type(e).__name__
  if isinstance(e, flags.UnrecognizedFlagError) and 'config' in flags.FLAGS:
    if e.flagname.startswith('config.'):
      return _missing('config', argv[1:])
    if 'Did you mean' not in said:
      said += f'; {_fields(e.flagname.rpartition(".")[2], known)}'
  return errors.UserError(said)


def _fields(name: str, known: Sequence[str]) -> str:
  """Returns a hint that names the known fields closest to `name`."""
  by_name = {}
  for field in known:
    by_name.setdefault(field.rpartition('.')[2], []).append(field)
  close = [name] if name in by_name else []
  close = close or [n for n in by_name if name in n.split('_')]
  close = close or difflib.get_close_matches(name, by_name, 2)
  meant = sorted(field for n in close for field in by_name[n])
  if not meant:
    return 'see --help, and docs/config.md for what --config.FIELD sets'
  return 'did you mean ' + ' or '.join(f'--config.{m}' for m in meant) + '?'
