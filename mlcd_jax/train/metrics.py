"""Writes metrics to metrics.jsonl, TensorBoard and Weights & Biases."""

from collections.abc import Mapping
import contextlib
import json
import logging
import pathlib
from typing import Any
import uuid

import ml_collections
import tensorboardX

from mlcd_jax import config as config_lib
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files

_log = logging.getLogger(__name__)


class Writer:
  """Writes scalars to metrics.jsonl, tensorboard/ and W&B.

  Only the main process writes.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    config: ml_collections.ConfigDict | None = None,
  ):
    """Opens the outputs and deletes entries of earlier invocations.

    An interrupted run may have logged steps after its last checkpoint. They
    will be taken again, so entries at or after `first_step` are deleted.

    Args:
      workdir: the folder of the run.
      first_step: the first step of this invocation.
      config: the config of the run. If its train.wandb_project names a
        project, metrics also go to Weights & Biases.

    Raises:
      UserError: Weights & Biases refuses the run.
    """
    self._file = self._board = self._wandb = None
    self._latest = {}
    if not distributed.is_main():
      return
    path = workdir / 'metrics.jsonl'
    _drop_from(path, first_step)
    # Line buffering: a killed run keeps every line it wrote.
    self._file = open(path, 'a', buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=first_step, write_to_disk=True
    )
    if config and config.train.wandb_project:
      self._wandb = _wandb_run(workdir, config)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of a step to all outputs.

    Args:
      step: the number of the step.
      values: the values by name, such as train/loss.
    """
    self._latest.update(values)
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    # W&B refuses steps it already has. A continued run repeats them with the
    # same values.
    if self._wandb and step >= self._wandb.step:
      self._wandb.log(values, step=step)

  def latest(self) -> dict[str, float]:
    """Returns the last value of each metric written since the last call."""
    latest, self._latest = self._latest, {}
    return latest

  def close(self) -> None:
    """Flushes and closes the outputs."""
    if self._file is not None:
      self._file.close()
      self._board.close()
    if self._wandb:
      self._wandb.finish()


def _wandb_run(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Any:
  """Starts or resumes the workdir's run at Weights & Biases.

  Raises:
    UserError: Weights & Biases refuses the run.
  """
  import wandb  # Optional; checked when the config was.

  # The id makes a later invocation resume the same run.
  path = workdir / 'wandb_id.txt'
  if not path.exists():
    with files.atomic(path) as temporary:
      temporary.write_text(uuid.uuid4().hex[:8])
  try:
    run = wandb.init(
      project=config.train.wandb_project,
      name=workdir.absolute().name,
      id=path.read_text(),
      resume='allow',
      dir=workdir,
      config=config_lib.to_dict(config),
      settings=wandb.Settings(console='off', silent=True),
    )
  except wandb.Error as e:
    raise errors.UserError(
      f'train.wandb_project={config.train.wandb_project}: {e}; run wandb '
      'login, or set WANDB_MODE=offline'
    ) from e
  _log.info('train: curves also at %s', run.dir if run.offline else run.url)
  return run


def _drop_from(path: pathlib.Path, first_step: int) -> None:
  """Deletes the lines at or after `first_step`, and lines without a step."""
  if not path.exists():
    return
  kept = []
  for line, row in files.parse_lines(path.read_bytes().splitlines()):
    with contextlib.suppress(KeyError, TypeError):
      if row['step'] < first_step:
        kept.append(line + b'\n')
  with files.atomic(path) as temporary:
    temporary.write_bytes(b''.join(kept))
