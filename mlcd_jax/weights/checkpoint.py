"""Checkpoints of the train state, written by Orbax."""

from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import watchdog
from mlcd_jax.weights import digests
from mlcd_jax.weights import shapes

_log = logging.getLogger(__name__)

# The messages of ENOSPC, EDQUOT and EFBIG, looked for in errors of any type.
_FULL = ('No space left', 'Disk quota exceeded', 'File too large')


class Checkpointer:
  """A store of train states, each in a folder named by its step."""

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    keep: int = 2,
    keep_every_steps: int = 0,
    keep_best: str = '',
    best_is: str = 'lowest',
  ):
    """Opens the folder of the checkpoints and creates it if needed.

    Args:
      folder: the folder of the checkpoints.
      keep: the number of latest checkpoints to keep.
      keep_every_steps: also keep every checkpoint at a multiple of this many
        steps, forever; 0 = none.
      keep_best: the metric whose best checkpoint is also kept; '' = none.
      best_is: whether the lowest or the highest value of that metric is best.
    """
    self._folder = folder
    self._best = keep_best
    sign = {'lowest': -1, 'highest': 1}[best_is]
    best_fn = (lambda metrics: sign * metrics[keep_best]) if keep_best else None
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every_steps:
      policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
    if keep_best:
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False
        )
      )
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      item_handlers=ocp.StandardCheckpointHandler(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=best_fn,  # Makes Orbax write the metric beside the state.
        cleanup_tmp_directories=True,
        # All processes use one list of steps, whatever each one's disk shows.
        single_host_load_and_broadcast=True,
        # The training loop decides when to save.
        save_interval_steps=1,
      ),
    )
    self._sealing = futures.ThreadPoolExecutor(1, 'seal')
    self._unsealed = None  # The step whose digests are not written yet.

  def save(
    self, step: int, state: Any, metrics: Mapping[str, float] | None = None
  ) -> None:
    """Writes a state in the background, unless its step is saved already.

    Args:
      step: the number of the step.
      state: the state after the step.
      metrics: metrics by name. Without a finite value of the metric
        `keep_best`, the checkpoint cannot become the best one.

    Raises:
      RunError: this checkpoint or the previous one cannot be written.
    """
    if step == self._manager.latest_step():
      return
    with self._explained():
      self._finish_last()
      self._manager.save(
        step,
        args=ocp.args.StandardSave(state),
        metrics=self._metric(step, metrics or {}),
        force=True,
      )
      self._unsealed = step

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads a state onto any mesh.

    Args:
      step: the step of a complete checkpoint.
      abstract_state: jax.ShapeDtypeStructs with the shardings to restore to.

    Raises:
      UserError: the checkpoint is damaged or belongs to another model.
    """
    try:
      return self._restore(step, abstract_state)
    except digests.Damaged as e:
      raise self._cannot_be_restored(step, str(e)) from e

  def restore_latest(self, abstract_state: Any) -> tuple[Any, int] | None:
    """Reads the latest undamaged state and moves damaged ones aside.

    Args:
      abstract_state: as for `restore`.

    Returns:
      The state and its step, or None if there is no checkpoint.

    Raises:
      UserError: all checkpoints are damaged, or one belongs to another model.
    """
    # Raises if the folder holds anything but checkpoints.
    distributed.decide('checkpoints', lambda: latest_step(self._folder))
    self._manager.reload()
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
      try:
        state = self._restore(step, abstract_state)
      except digests.Damaged as e:
        _log.warning('train: checkpoint %d is damaged and skipped: %s', step, e)
        damaged.append(step)
        continue
      self._set_aside(damaged)
      return state, step
    if damaged:
      raise errors.UserError(
        f'{self._folder}: none of the checkpoints {damaged} can be restored; '
        'delete the folder to train anew'
      )
    return None

  def close(self) -> None:
    """Waits for the last write and logs which checkpoint is the best.

    Raises:
      RunError: the checkpoint cannot be written.
    """
    with self._explained():
      self._finish_last()
      self._sealing.shutdown()
      best = self._manager.best_step() if self._best else None
      if best is not None:
        _log.info('train: checkpoint %d is the best by %s', best, self._best)
      self._manager.close()

  def _finish_last(self) -> None:
    """Waits for the last write, then starts writing its digests."""
    self._manager.wait_until_finished()
    step, self._unsealed = self._unsealed, None
    if step is not None and distributed.is_main():
      self._sealing.submit(digests.write, self._folder / str(step))

  def _metric(
    self, step: int, metrics: Mapping[str, float]
  ) -> dict[str, float] | None:
    """Returns the metric to write beside a state, None if it has none."""
    value = metrics.get(self._best)
    if value is not None and math.isfinite(value):
      return {self._best: float(value)}
    if self._best:
      _log.warning(
        'train: checkpoint %d cannot be the best: train.keep_best=%s is not '
        'among what was logged since the one before: %s',
        step,
        self._best,
        ', '.join(sorted(metrics)),
      )
    return None

  def _explained(self) -> '_Explained':
    """Returns a context that explains errors of writing to this folder."""
    return _Explained(self._folder)

  def _restore(self, step: int, abstract_state: Any) -> Any:
    """Does `restore`, but raises digests.Damaged, in all processes alike."""
    found = distributed.decide('checkpoint', lambda: self._look(step))
    if 'damage' in found:
      raise digests.Damaged(found['damage'])
    self._check_same_model(step, found['shapes'], abstract_state)
    try:
      # Not strict, since the padding of class centers depends on the mesh.
      return self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract_state, strict=False)
      )
    except Exception as e:  # Orbax and TensorStore raise all kinds.
      if watchdog.may_be_lost(e):
        watchdog.wait()  # A lost process is no damage of the checkpoint.
      if jax.process_count() > 1:
        # Others may see no damage. A retry here would leave them waiting.
        raise self._cannot_be_restored(step, _first_line(e)) from e
      raise digests.Damaged(_first_line(e)) from e

  def _look(self, step: int) -> dict[str, Any]:
    """Returns {'shapes': shapes of the arrays} or {'damage': a reason}."""
    try:
      digests.check(self._folder / str(step))
      return {'shapes': shapes.by_path(self._manager.item_metadata(step))}
    except Exception as e:  # Orbax and TensorStore raise all kinds.
      return {'damage': _first_line(e)}

  def _cannot_be_restored(self, step: int, reason: str) -> errors.UserError:
    """Makes the error for a checkpoint that is damaged."""
    return errors.UserError(
      f'{self._folder / str(step)}: cannot be restored ({reason}); delete it '
      'to go on from the checkpoint before'
    )

  def _check_same_model(
    self, step: int, saved: Mapping[str, str], wanted: Any
  ) -> None:
    """Raises UserError if a checkpoint's arrays differ from the state's."""
    wanted = shapes.by_path(wanted)
    differences = [
      f'{name} is {saved.get(name, "missing")} there and '
      f'{wanted.get(name, "missing")} here'
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)
    ]
    if differences:
      more = len(differences) - 3
      raise errors.UserError(
        f'{self._folder / str(step)} is of another model: '
        + '; '.join(differences[:3])
        + f' and {more} more' * (more > 0)
        + '; set the model back, or use another --workdir'
      )

  def _set_aside(self, steps: list[int]) -> None:
    """Moves checkpoints to damaged/, so that their steps can be saved again."""
    if steps and distributed.is_main():
      aside = self._folder / 'damaged'
      aside.mkdir(exist_ok=True)
      for step in steps:
        target = aside / str(step)
        while target.exists():
          target = target.with_name(target.name + '_before')
        (self._folder / str(step)).rename(target)
    distributed.barrier('damaged checkpoints')
    self._manager.reload()


def restore_part(folder: pathlib.Path, step: int, abstract: Any) -> Any:
  """Reads only some arrays of a checkpoint, onto one device.

  Args:
    folder: the folder of the checkpoints.
    step: the step of a complete checkpoint.
    abstract: jax.ShapeDtypeStructs of the arrays, nested as in the state.

  Raises:
    UserError: the checkpoint is damaged or has no such arrays.
  """
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  try:
    digests.check(folder / str(step))
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
  """Returns the shape of a float32 array of a checkpoint.

  Args:
    folder: the folder of the checkpoints.
    step: the step of a complete checkpoint.
    names: the names on the path of the array in the state.
  """
  return jax.ShapeDtypeStruct(_at(_metadata(folder, step), names), jnp.float32)


def has(folder: pathlib.Path, step: int, name: str) -> bool:
  """Returns whether the field `name` of a saved state has any arrays."""
  return bool(jax.tree.leaves(_metadata(folder, step).get(name)))


def _metadata(folder: pathlib.Path, step: int) -> Any:
  """Returns shapes and types of a checkpoint's arrays, nested as saved."""
  path = _array_folder(folder, step)
  return ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree


def _at(tree: Any, names: Sequence[str]) -> tuple[int, ...]:
  """Returns the shape at a path in a nested dict."""
  for name in names:
    tree = tree[name]
  return tuple(tree.shape)


def _array_folder(folder: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the folder of the arrays inside a checkpoint."""
  # CheckpointManager calls its only item `default`.
  return folder.absolute() / str(step) / 'default'


def latest_step(folder: pathlib.Path) -> int | None:
  """Returns the step of the last complete checkpoint, None without one.

  Raises:
    UserError: the folder holds something that is not a checkpoint.
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


def step_of(path: pathlib.Path) -> int:
  """Returns the step of a complete checkpoint, given its folder.

  Raises:
    UserError: there is no such checkpoint.
  """
  steps = sorted(ocp.utils.checkpoint_steps(path.parent))
  if path.name not in map(str, steps):
    raise errors.UserError(
      f'{path}: no checkpoint; there are ' + ', '.join(map(str, steps))
    )
  return int(path.name)


class _Explained:
  """A context that turns errors of writing into a RunError of one line."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, e, traceback) -> None:
    """Raises a RunError in place of an error of writing."""
    if e is None or not isinstance(e, Exception):
      return
    said = str(e)
    last = f'the last good checkpoint is {latest_step(self._folder)}'
    if any(text in said for text in _FULL):
      raise errors.RunError(
        f'{self._folder}: no space left on the disk; {last}; make space and '
        'run the same command to continue'
      ) from e
    if isinstance(e, OSError):
      raise errors.RunError(
        f'{self._folder}: cannot be written ({e.strerror}); {last}'
      ) from e


def _first_line(e: Exception) -> str:
  """Returns the first line of a message, at most 200 characters."""
  return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
