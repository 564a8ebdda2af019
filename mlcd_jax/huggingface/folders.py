"""Where weights are: a local folder, or a name on the Hugging Face hub."""

import logging
import pathlib
import re

import huggingface_hub

from mlcd_jax import errors
from mlcd_jax import paths

_log = logging.getLogger(__name__)

# ORG/NAME or ORG/NAME@REVISION.
_NAME = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$')
_FILES = ('*.json', '*.safetensors')


def resolve(path: str, field: str) -> pathlib.Path:
  """Returns the folder that a path or a name stands for.

  A name is looked up in the hub's local cache and else downloaded; of a name
  without a revision the commit is logged. The folder's own name is then the
  commit.

  Args:
    path: a local folder, or ORG/NAME[@REVISION].
    field: what to call it in errors.

  Raises:
    UserError: neither a folder nor a name that can be had.
  """
  folder = paths.local(path)
  if folder.is_dir():
    return folder
  match = _NAME.match(path)
  if match is None:
    raise errors.UserError(
      f'{field}={path}: no such folder, and not a name such as ORG/NAME or '
      'ORG/NAME@REVISION'
    )
  name, revision = match.groups()
  try:
    folder = pathlib.Path(
      huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=_FILES
      )
    )
  except Exception as e:  # The hub's client raises all kinds.
    raise errors.UserError(
      f'{field}={path}: no such folder, and the hub does not give it '
      f'({str(e).strip().splitlines()[0]}); download it and name its folder'
    ) from e
  if revision is None:
    _log.info('%s is at commit %s; %s@%s pins it', name, folder.name, name,
              folder.name)  # fmt: skip
  return folder


def pinned(path: str, field: str) -> str:
  """Returns the path, or the name with the commit it stands for now."""
  folder = resolve(path, field)
  if paths.local(path).is_dir():
    return path
  return f'{path.partition("@")[0]}@{folder.name}'
