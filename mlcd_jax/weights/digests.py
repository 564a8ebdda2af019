"""SHA-256 digests of the files of a checkpoint.

Orbax notices files that are truncated or missing, but restores changed bytes
without an error. The digests detect those too.
"""

import json
import logging
import pathlib

from mlcd_jax.runtime import files

_log = logging.getLogger(__name__)

_NAME = 'sha256.json'


class Damaged(Exception):
  """An error for a damaged checkpoint; the message gives the reason."""


def write(folder: pathlib.Path) -> None:
  """Writes the digests of all files of a complete checkpoint.

  Errors of the file system are logged, not raised.

  Args:
    folder: the folder of the checkpoint.
  """
  try:
    found = {
      str(p.relative_to(folder)): files.sha256(p)
      for p in sorted(folder.rglob('*'))
      if p.is_file()
    }
    if folder.exists():
      files.write_json(folder / _NAME, found)
  # The checkpoint may be deleted meanwhile, or the disk be full. It is complete
  # without digests, so training goes on.
  except OSError as e:
    _log.info('train: %s has no digests: %s', folder, e)


def check(folder: pathlib.Path) -> None:
  """Raises Damaged if a file of a checkpoint is missing or has changed.

  Args:
    folder: the folder of the checkpoint.
  """
  path = folder / _NAME
  # A run killed just after a save leaves no digests. Then only Orbax checks.
  if not path.exists():
    return
  try:
    written = json.loads(path.read_text())
  except ValueError as e:
    raise Damaged(f'{_NAME} is broken') from e
  for name, digest in written.items():
    # A crafted file could name files outside the checkpoint.
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
      raise Damaged(f'{_NAME} names {name}, which lies elsewhere')
    if not files.unchanged(folder, {name: digest}):
      raise Damaged(f'{name} is missing or changed')
