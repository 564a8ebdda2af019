"""Checkpoints of the train state, by Orbax."""

import pathlib
from typing import Any

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
