"""Finds weights in a local folder or on the Hugging Face hub."""

from collections.abc import Iterator
import logging
import pathlib
import re

import huggingface_hub

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths

_log = logging.getLogger(__name__)

# ORG/NAME or ORG/NAME@REVISION.
_NAME = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$')
# The files to download from a repository. Pickled weights are never read.
_FILES = ('*.json', '*.safetensors')

# The kinds of folders with an encoder: of a run, of `convert import`, or as
# transformers or OpenCLIP writes it.
RUN, IMPORTED, RELEASED = 'run', 'imported', 'released'
_ACCEPTED = (
  'name a workdir or one of its checkpoints, a folder of `convert import`, one '
  'with safetensors as transformers or OpenCLIP writes it, or '
  'ORG/NAME[@REVISION]'
)

# The number of files that a message names before "and N more".
_SHOWN = 4


def find(path: str, field: str) -> tuple[str, pathlib.Path]:
  """Returns the kind of an encoder and its folder.

  Every option that names an encoder uses this function, so that each accepts
  all kinds.

  Args:
    path: a workdir or one of its checkpoints, a folder of `convert import`, a
      folder as `transformers` or OpenCLIP writes it, or ORG/NAME[@REVISION].
    field: the name of the config field or argument, for errors.

  Returns:
    RUN, IMPORTED or RELEASED, and the local folder.

  Raises:
    UserError: there is no encoder; the message tells what is there instead.
  """
  folder = paths.local(path, field)
  if _is_run(folder):
    return RUN, folder
  folder = resolve(path, field)
  try:
    kind = _kind(folder)
    if kind:
      return kind, folder
    described = _described(folder)
  except OSError as e:
    described = f'cannot be read ({e.strerror})'
  raise errors.UserError(f'{field}={path}: {described}; {_ACCEPTED}')


def _kind(folder: pathlib.Path) -> str:
  """Returns the kind of the encoder in a folder; '' without one."""
  if _is_run(folder):
    return RUN
  if (folder / 'model.json').is_file():
    return IMPORTED
  if (folder / 'open_clip_config.json').is_file():
    return RELEASED
  path = folder / 'config.json'
  if not path.is_file():
    return ''
  config = files.read_json(path)
  # A workdir before training has a config.json, too, and so has timm's layout.
  # Neither has a model_type.
  ours = isinstance(config, dict) and 'model_type' not in config
  return '' if ours and {'model', 'architecture'} & set(config) else RELEASED


def _is_run(folder: pathlib.Path) -> bool:
  """Returns whether a path is a workdir with checkpoints or a checkpoint.

  A checkpoint is recognised by its path and need not exist.
  """
  parent = folder.absolute().parent
  inside = parent.name == 'checkpoints' and parent.is_dir()
  # Its name must be a step: folders called `checkpoints` may also hold
  # downloaded weights.
  return inside and folder.name.isdigit() or (folder / 'checkpoints').is_dir()


def _described(folder: pathlib.Path) -> str:
  """Describes the content of a folder without an encoder, for an error."""
  if (folder / 'config.json').is_file():
    if 'architecture' in files.read_json(folder / 'config.json'):
      return "its config.json is timm's, whose models are not read"
    return 'a workdir in which nothing is trained yet'
  inside = [p for p in _children(folder) if p.is_dir() and _kind(p)]
  if inside:
    return f'no encoder there, but in {inside[0]}'
  names = [p.name for p in _children(folder)]
  more = len(names) - _SHOWN
  shown = ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
  return f'no encoder there, only {shown}' if names else 'an empty folder'


def _children(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields what a folder contains, then its snapshots.

  A repository in the hub's local cache has a folder `snapshots`, with a folder
  for each commit.
  """
  yield from sorted(folder.iterdir())
  yield from sorted(folder.glob('snapshots/*'))


def resolve(path: str, field: str) -> pathlib.Path:
  """Returns the local folder of a path or a name, which may be downloaded.

  A name gives a folder in the hub's local cache, called after the commit.
  Missing files are downloaded first. The commit of a name without a revision is
  logged.

  Args:
    path: a local folder, or ORG/NAME[@REVISION].
    field: the name of the config field or argument, for errors.

  Raises:
    UserError: there is no such folder, and the download failed.
  """
  folder = paths.local(path)
  if folder.is_dir():
    return folder
  if folder.exists():
    raise errors.UserError(
      f'{field}={path}: a file; name the folder it is in, which has its config'
    )
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
  """Adds the present commit to a name; a local path stays as it is.

  Args:
    path: a local folder, or ORG/NAME[@REVISION].
    field: the name of the config field or argument, for errors.

  Returns:
    The local path, or ORG/NAME@COMMIT.
  """
  folder = resolve(path, field)
  if paths.local(path).is_dir():
    return path
  return f'{path.partition("@")[0]}@{folder.name}'
