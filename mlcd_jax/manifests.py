"""What each stage was made from, kept beside its files in manifest.json."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths

NAME = 'manifest.json'

# Fields that had another name when older workdirs were made: the new name, and
# the new values where these differ.
_RENAMED = {'cluster.screening': ('cluster.method', {'off': 'exact'})}


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
    """Writes the file, from the first process; all then have what it has."""

    def write() -> dict[str, Any]:
      self.folder.mkdir(parents=True, exist_ok=True)
      files.write_json(self.folder / NAME, self.as_dict())
      return self.as_dict()

    vars(self).update(distributed.decide(f'manifest {self.stage}', write))

  def finish(self, **result: Any) -> None:
    """Marks the stage complete with its results."""
    self.result = result
    self.complete = True
    self.save()

  def fingerprint(self) -> str:
    """Hex digest of what the stage was made from and what it made."""
    identity = {k: self.as_dict()[k] for k in ('config', 'inputs', 'result')}
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def as_dict(self) -> dict[str, Any]:
    """What the file holds."""
    return {
      'stage': self.stage,
      'config': self.config,
      'inputs': self.inputs,
      'notes': self.notes,
      'result': self.result,
      'complete': self.complete,
    }


def load(folder: pathlib.Path) -> Manifest | None:
  """Reads a folder's manifest as process 0 sees it; all processes call it.

  Returns:
    The manifest, or None where there is none, or where the stage was begun and
    made nothing, so that a mistake that stopped it leaves nothing to undo.

  Raises:
    UserError: the file is there and is no manifest.
  """

  def look() -> dict[str, Any] | None:
    found = read(folder)
    return found and found.as_dict()

  content = distributed.decide(f'read {folder.name}', look)
  return content and Manifest(folder=folder, **content)


def read(folder: pathlib.Path) -> Manifest | None:
  """As `load`, in one process."""
  path = folder / NAME
  if not path.exists():
    return None
  content = files.read_json(path, folder)
  try:
    found = Manifest(folder=folder, **content)
  except (TypeError, ValueError) as e:
    raise errors.UserError(
      f'{path}: not a manifest; delete {folder} to make that stage again'
    ) from e
  return found if found.complete or _other_files(folder) else None


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
  if distributed.is_main():  # Before others may write: `load` lets them go on.
    files.remove_leftovers(folder)
  found = load(folder)
  if found is None:
    if distributed.decide(f'opened {stage}', lambda: _other_files(folder)):
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


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a manifest's fields by the names that they have now.

  The file stays as it is: its fingerprint is in the next stage's manifest.
  """
  config = dict(config)
  for old, (new, values) in _RENAMED.items():
    if old in config:
      value = config.pop(old)
      config.setdefault(new, values.get(value, value))
  return config


def check_same(
  made_with: Mapping[str, Any], wanted: Mapping[str, Any], folder
) -> None:
  """Raises UserError naming the first field that differs."""
  made_with = _renamed(made_with)
  for field, value in wanted.items():
    if field not in made_with:
      raise errors.UserError(
        f'{folder} was made by a version that did not note {field}; use '
        'another --workdir, or delete it to make it again'
      )
    if made_with[field] != value:
      raise errors.UserError(
        f'{folder} was made with {field}={made_with[field]!r}, this run '
        f'has {value!r}; use another --workdir, or set it back with '
        f'--config.{field}'
      )


def places(workdir: pathlib.Path, folders: Mapping[str, pathlib.Path]) -> str:
  """Returns a line for each thing that the run left, and where it lies."""
  found = {
    **folders,
    'curves': workdir / 'metrics.jsonl',
    'results': workdir / 'results.json',
    'page': workdir / 'report.html',
  }
  return '\n'.join(
    f'  {name:<9} {path}' for name, path in found.items() if path.exists()
  )


def check_bad_keys(path: str, manifest: Manifest) -> None:
  """Notes which keys a stage leaves out; they must stay the same.

  Raises:
    UserError: the stage began with others, so that the order was another.
  """
  digest = files.sha256(paths.local(path)) if path else ''
  manifest.notes.setdefault('bad_keys', digest)
  manifest.save()  # All processes then have what process 0 has.
  if manifest.notes['bad_keys'] != digest:
    raise errors.UserError(
      f'data.bad_keys={path!r}: {manifest.folder} was begun with other keys '
      'left out; use another --workdir, or delete it to make it again'
    )
