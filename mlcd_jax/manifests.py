"""What each stage was made from, kept beside its files in manifest.json."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

from mlcd_jax import distributed
from mlcd_jax import errors
from mlcd_jax import files

NAME = 'manifest.json'


class Manifest:
  """The record of one stage's config, inputs and results.

  Attributes:
    stage: its name.
    folder: where its files are.
    config: dotted config fields that its files depend on.
    inputs: fingerprints of the stages it read.
    notes: what it keeps for its own continuation and for later stages.
    result: what it made; empty until it is complete.
    complete: whether it finished.
  """

  def __init__(
    self,
    stage: str,
    folder: pathlib.Path,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    complete: bool = False,
  ):
    self.stage = stage
    self.folder = folder
    self.config = dict(config)
    self.inputs = dict(inputs)
    self.notes = dict(notes or {})
    self.result = dict(result or {})
    self.complete = complete

  def save(self) -> None:
    """Writes the file, from the first process."""
    if distributed.is_main():
      self.folder.mkdir(parents=True, exist_ok=True)
      files.write_json(self.folder / NAME, self._as_dict())
    distributed.barrier(f'manifest {self.stage}')

  def finish(self, **result: Any) -> None:
    """Marks the stage complete with its results."""
    self.result = result
    self.complete = True
    self.save()

  def fingerprint(self) -> str:
    """Hex digest of what the stage was made from and what it made."""
    identity = {k: self._as_dict()[k] for k in ('config', 'inputs', 'result')}
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def _as_dict(self) -> dict[str, Any]:
    return {
      'stage': self.stage,
      'config': self.config,
      'inputs': self.inputs,
      'notes': self.notes,
      'result': self.result,
      'complete': self.complete,
    }


def load(folder: pathlib.Path) -> Manifest | None:
  """Reads a folder's manifest, in all processes.

  Returns:
    The manifest, or None where there is none, or where the stage was begun and
    made nothing, so that a mistake that stopped it leaves nothing to undo.

  Raises:
    UserError: the file is there and is no manifest.
  """
  path = folder / NAME
  content = files.read_json(path, folder) if path.exists() else None
  made_nothing = content is not None and not _other_files(folder)
  # All processes see the same before one of them writes.
  distributed.barrier(f'read {path}')
  if content is None:
    return None
  try:
    found = Manifest(content.pop('stage'), folder, **content)
  except (AttributeError, KeyError, TypeError) as e:
    raise errors.UserError(
      f'{path}: not a manifest; delete {folder} to make that stage again'
    ) from e
  return None if made_nothing and not found.complete else found


def _other_files(folder: pathlib.Path) -> bool:
  """Whether there is anything beside the manifest and temporary files."""
  return folder.exists() and any(
    p.name != NAME and not p.match('.*.tmp') for p in folder.iterdir()
  )


def open_for(
  stage: str,
  folder: pathlib.Path,
  *,
  config: Mapping[str, Any],
  inputs: Mapping[str, Any],
) -> Manifest:
  """Reads a stage's manifest, or starts one.

  Raises:
    UserError: the folder was made with another config or from other inputs,
      or nothing says from what.
  """
  found = load(folder)
  if distributed.is_main():
    files.remove_leftovers(folder)
  unexplained = not found and _other_files(folder)
  # All processes have looked before one of them writes.
  distributed.barrier(f'opened {stage}')
  if found is None:
    if unexplained:
      raise errors.UserError(
        f'{folder} has files but no {NAME} that says what they were made '
        'from; delete it to make that stage again'
      )
    manifest = Manifest(stage, folder, config=config, inputs=inputs)
    manifest.save()
    return manifest
  check_same(found.config, config, folder)
  for name, value in inputs.items():
    if found.inputs.get(name) != value:
      raise errors.UserError(
        f'{folder} was made from other {name} than there are now; use '
        f'another --workdir, or delete {folder} to make it again'
      )
  return found


def check_same(
  made_with: Mapping[str, Any], wanted: Mapping[str, Any], folder
) -> None:
  """Raises UserError naming the first field that differs."""
  for field, value in wanted.items():
    if made_with.get(field) != value:
      raise errors.UserError(
        f'{folder} was made with {field}={made_with.get(field)!r}, this run '
        f'has {value!r}; use another --workdir, or set it back with '
        f'--config.{field}'
      )
