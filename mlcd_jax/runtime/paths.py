"""Expansion of the paths that users give."""

import os
import pathlib

from mlcd_jax.runtime import errors


def expand(path: str | os.PathLike, field: str = '') -> str:
  """Returns a path with a leading ~ replaced by the home folder.

  Shells do not expand the ~ in --flag=~/x.

  Args:
    path: a local path, a glob or a URL; file:///x becomes /x.
    field: the name of the field that an error gives.

  Raises:
    UserError: the path begins with ~ and there is no home folder.
  """
  path = os.fspath(path).removeprefix('file://')
  if path.partition('/')[0] == '~' and home() is None:
    raise errors.UserError(
      f'{field and field + "="}{path}: there is no home folder (HOME is not '
      'set); name the folder in full'
    )
  return os.path.expanduser(path)


def local(path: str | os.PathLike, field: str = '') -> pathlib.Path:
  """Returns the result of `expand` as a pathlib.Path."""
  return pathlib.Path(expand(path, field))


def home() -> str | None:
  """Returns the user's home folder, or None if there is none.

  Containers may have neither HOME nor an entry for the user.
  """
  found = os.path.expanduser('~')
  return None if found == '~' else found
