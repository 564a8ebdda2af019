"""Checkpoints of the train state, by Orbax."""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mlcd_jax import errors

# Checkpoints that are kept; the last ones.
_MAX_TO_KEEP = 2


class Checkpointer:
  """Saves and restores train states under a folder, one folder a step."""

  def __init__(self, folder: pathlib.Path):
    """Opens the folder, or makes it."""
    self._folder = folder
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_MAX_TO_KEEP,
        cleanup_tmp_directories=True,
        # When to save is the training loop's decision.
        save_interval_steps=1,
      ),
    )

  def save(self, step: int, state: Any) -> None:
    """Writes in the background, unless the step is there already."""
    if step != self._manager.latest_step():
      self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads a state onto any mesh.

    Args:
      step: of a complete checkpoint.
      abstract_state: jax.ShapeDtypeStructs with the shardings wanted.

    Raises:
      UserError: the checkpoint is damaged or of another model.
    """
    try:
      return self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract_state)
      )
    except Exception as e:  # Orbax and TensorStore raise all kinds.
      raise errors.UserError(
        f'{self._folder / str(step)}: cannot be restored '
        f'({str(e).strip().splitlines()[0]}); delete it to go on from the '
        'checkpoint before'
      ) from e

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_part(folder: pathlib.Path, step: int, abstract: Any) -> Any:
  """Reads some arrays of a checkpoint, onto one device, and not the others.

  Args:
    folder: of the checkpoints.
    step: of a complete checkpoint.
    abstract: jax.ShapeDtypeStructs of those arrays, nested as in the state.

  Raises:
    UserError: the checkpoint is damaged, or has no such arrays.
  """
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  try:
    found = _metadata(folder, step)
    for path, x in jax.tree_util.tree_leaves_with_path(abstract):
      names = [key.key for key in path]
      if _at(found, names) != x.shape:
        raise ValueError(
          f'{"/".join(names)} is {_at(found, names)}, expected {x.shape}'
        )
    return ocp.PyTreeCheckpointer().restore(
      _array_folder(folder, step),
      args=ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
      ),
    )
  except Exception as e:  # Orbax and TensorStore raise all kinds.
    raise errors.UserError(
      f'{folder / str(step)}: cannot be restored '
      f'({str(e).strip().splitlines()[0]})'
    ) from e


def shape(
  folder: pathlib.Path, step: int, names: Sequence[str]
) -> jax.ShapeDtypeStruct:
  """The shape of one float32 array of a checkpoint, by its path's names."""
  return jax.ShapeDtypeStruct(_at(_metadata(folder, step), names), jnp.float32)


def has(folder: pathlib.Path, step: int, name: str) -> bool:
  """Whether a part of the state has any arrays."""
  return bool(jax.tree.leaves(_metadata(folder, step).get(name)))


def _metadata(folder: pathlib.Path, step: int) -> Any:
  path = _array_folder(folder, step)
  return ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree


def _at(tree: Any, names: Sequence[str]) -> tuple[int, ...]:
  for name in names:
    tree = tree[name]
  return tuple(tree.shape)


def _array_folder(folder: pathlib.Path, step: int) -> pathlib.Path:
  return folder.absolute() / str(step) / 'default'


def latest_step(folder: pathlib.Path) -> int | None:
  """The last complete checkpoint's step; None where there is none.

  Raises:
    UserError: a folder that looks like a checkpoint is none.
  """
  if not folder.exists():
    return None
  try:
    return max(ocp.utils.checkpoint_steps(folder), default=None)
  except ValueError as e:
    raise errors.UserError(
      f'{folder}: not a folder of checkpoints ({e}); delete what does not '
      'belong there'
    ) from e
