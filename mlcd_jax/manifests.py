"""Manifests: records of what each stage was made from, in manifest.json."""

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

# Fields that were renamed since older workdirs were made: old name -> the new
# name and the values that were renamed too.
_RENAMED = {'cluster.screening': ('cluster.method', {'off': 'exact'})}


class Manifest:
  """The record of one stage's config, inputs and results.

  Attributes:
    stage: the name of the stage.
    folder: the folder of its files.
    config: the config fields that its files depend on, by dotted name.
    inputs: the fingerprints of the stages that it read.
    notes: values that it keeps for its continuation and for later stages.
    result: the description of its results; empty until it is complete.
    complete: True once the stage has finished.
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
    """Writes the file from process 0 and gives all processes its content."""

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
    """Returns the hex digest of the stage's config, inputs and result."""
    identity = {k: self.as_dict()[k] for k in ('config', 'inputs', 'result')}
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def as_dict(self) -> dict[str, Any]:
    """Returns the content of the file."""
    return {
      'stage': self.stage,
      'config': self.config,
      'inputs': self.inputs,
      'notes': self.notes,
      'result': self.result,
      'complete': self.complete,
    }


def load(folder: pathlib.Path) -> Manifest | None:
  """Reads the manifest of a folder in process 0; all processes must call it.

  Returns:
    The manifest in all processes. It is None if there is no file. It is also
    None if the stage began but made no files, so that the user can correct a
    mistake in the config without deleting the folder.

  Raises:
    UserError: the file is not a manifest.
  """

  def look() -> dict[str, Any] | None:
    found = read(folder)
    return found and found.as_dict()

  content = distributed.decide(f'read {folder.name}', look)
  return content and Manifest(folder=folder, **content)


def read(folder: pathlib.Path) -> Manifest | None:
  """Reads the manifest of a folder in this process alone; see `load`."""
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
  """Returns whether a folder has more than a manifest and temporary files."""
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
  """Reads the manifest of a stage or creates a new one.

  Args:
    stage: the name of the stage.
    folder: the folder of its files.
    config: the config fields that its files depend on, by dotted name.
    inputs: the fingerprints of the stages that it reads.

  Raises:
    UserError: the folder was made with another config or from other inputs, or
      it has files but no manifest.
  """
  # The other processes wait in `load` for process 0, so none of them writes a
  # temporary file yet.
  if distributed.is_main():
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
  """Returns the fields of a manifest by their present names.

  The file keeps the old names, because the next stage's manifest holds its
  fingerprint.
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
  """Raises a UserError that names the first field that differs.

  Args:
    made_with: the fields in a manifest, by dotted name.
    wanted: the fields of this run, by dotted name.
    folder: the folder that the error names.
  """
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
  """Returns one line with the path of each result that exists."""
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
  """Records the bad keys that a stage leaves out, or checks them.

  They must stay the same, since they change the order of the images.

  Args:
    path: the file of bad keys, or ''.
    manifest: the manifest of the stage.

  Raises:
    UserError: the stage began with other bad keys.
  """
  digest = files.sha256(paths.local(path)) if path else ''
  manifest.notes.setdefault('bad_keys', digest)
  manifest.save()  # It gives all processes the digest of process 0.
  if manifest.notes['bad_keys'] != digest:
    raise errors.UserError(
      f'data.bad_keys={path!r}: {manifest.folder} was begun with other keys '
      'left out; use another --workdir, or delete it to make it again'
    )
