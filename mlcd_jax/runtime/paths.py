"""What the paths that users give stand for."""

import os
import pathlib

from mlcd_jax.runtime import errors


def expand(path: str | os.PathLike, field: str = '') -> str:
  """Returns a path with ~ replaced; shells leave it alone within --flag=~/x.

  Args:
    path: local path, glob or URL; file:///x is /x.
    field: what to call it in errors.

  Raises:
    UserError: it begins with ~ and there is no home folder.
  """
  path = os.fspath(path).removeprefix('file://')
  if path.partition('/')[0] == '~' and home() is None:
    raise errors.UserError(
      f'{field and field + "="}{path}: there is no home folder (HOME is not '
      'set); name the folder in full'
    )
  return os.path.expanduser(path)


def local(path: str | os.PathLike, field: str = '') -> pathlib.Path:
  """As `expand`, of a path on this machine."""
  return pathlib.Path(expand(path, field))


def home() -> str | None:
  """The user's home folder; None where a container has none."""
  found = os.path.expanduser('~')
  return None if found == '~' else found
