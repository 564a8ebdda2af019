"""The digests of a checkpoint's files.

Orbax notices a file that is cut short or gone, but restores changed bytes as
if nothing were.
"""

import json
import logging
import pathlib

from mlcd_jax.runtime import files

_log = logging.getLogger(__name__)

_NAME = 'sha256.json'


class Damaged(Exception):
  """A checkpoint that cannot be used; says why."""


def write(folder: pathlib.Path) -> None:
  """Writes the digests of a finished checkpoint's files."""
  try:
    found = {
      str(p.relative_to(folder)): files.sha256(p)
      for p in sorted(folder.rglob('*'))
      if p.is_file()
    }
    if folder.exists():
      files.write_json(folder / _NAME, found)
  except OSError as e:  # Deleted meanwhile, or no space: it is whole anyway.
    _log.info('train: %s has no digests: %s', folder, e)


def check(folder: pathlib.Path) -> None:
  """Raises Damaged naming a file that is not as it was written.

  A process that is killed just after a save has not written them yet; then
  Orbax's own checks must do.
  """
  path = folder / _NAME
  if not path.exists():
    return
  try:
    written = json.loads(path.read_text())
  except ValueError as e:
    raise Damaged(f'{_NAME} is broken') from e
  for name, digest in written.items():
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
      raise Damaged(f'{_NAME} names {name}, which lies elsewhere')
    if not files.unchanged(folder, {name: digest}):
      raise Damaged(f'{name} is missing or changed')
