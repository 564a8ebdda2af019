"""Checkpoints of the train state, by Orbax."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

# Checkpoints that are kept; the last ones.
_MAX_TO_KEEP = 2


class Checkpointer:
  """Saves and restores train states under a folder, one folder a step."""

  def __init__(self, folder: pathlib.Path, *, every_steps: int):
    """Opens the folder.

    Args:
      folder: made where missing.
      every_steps: `save` writes at its multiples.
    """
    self._every_steps = every_steps
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_MAX_TO_KEEP,
        cleanup_tmp_directories=True,
        # Due steps are decided here.
        save_interval_steps=1,
      ),
    )

  def latest_step(self) -> int | None:
    """The last complete checkpoint's step."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, *, force: bool = False) -> None:
    """Writes in the background when due, or now when forced."""
    if step == self.latest_step():
      return
    if force or step % self._every_steps == 0:
      self._manager.save(step, args=ocp.args.StandardSave(state), force=force)

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads a state onto any mesh.

    Args:
      step: of a complete checkpoint.
      abstract_state: jax.ShapeDtypeStructs with the shardings wanted.
    """
    return self._manager.restore(
      step, args=ocp.args.StandardRestore(abstract_state)
    )

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def latest_step(folder: pathlib.Path) -> int | None:
  """The last complete checkpoint's step; None where there is none."""
  steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
  return max(steps, default=None)
