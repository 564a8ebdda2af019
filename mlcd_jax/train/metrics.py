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
  """Writes scalars to metrics.jsonl, tensorboard/ and W&B, on one process."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    config: ml_collections.ConfigDict | None = None,
  ):
    """Opens them; what an earlier invocation wrote from `first_step` on goes.

    Args:
      workdir: the run's folder.
      first_step: the step this invocation starts with.
      config: of the run, whose train.wandb_project may name one.

    Raises:
      UserError: Weights & Biases does not take the run.
    """
    self._file = self._board = self._wandb = None
    self._latest = {}
    if not distributed.is_main():
      return
    path = workdir / 'metrics.jsonl'
    _drop_from(path, first_step)
    self._file = open(path, 'a', buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=first_step, write_to_disk=True
    )
    if config and config.train.wandb_project:
      self._wandb = _wandb_run(workdir, config)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line and one point a value."""
    self._latest.update(values)
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    # It refuses what it has; a continued run brings the same numbers again.
    if self._wandb and step >= self._wandb.step:
      self._wandb.log(values, step=step)

  def latest(self) -> dict[str, float]:
    """The last value of every metric since this was asked before."""
    latest, self._latest = self._latest, {}
    return latest

  def close(self) -> None:
    """Flushes all."""
    if self._file is not None:
      self._file.close()
      self._board.close()
    if self._wandb:
      self._wandb.finish()


def _wandb_run(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> Any:
  """Begins the workdir's run at Weights & Biases, or goes on with it."""
  import wandb  # Optional; config_check has looked for it.

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
  """Drops the lines of steps that will be written again."""
  if not path.exists():
    return
  kept = []
  for line, row in files.parse_lines(path.read_bytes().splitlines()):
    with contextlib.suppress(KeyError, TypeError):
      if row['step'] < first_step:
        kept.append(line + b'\n')
  with files.atomic(path) as temporary:
    temporary.write_bytes(b''.join(kept))
