"""Several processes: finding each other, and waiting for each other."""

import logging
import os
import pathlib

import jax

from mlcd_jax import errors

_log = logging.getLogger(__name__)


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  init_timeout: int = 300,
) -> None:
  """Joins the run's processes; call before any other use of jax.

  Without arguments the launcher is asked: TPU pods, Slurm, Open MPI and
  Kubernetes JobSets are detected, anything else is one process.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: how many there are.
    process_id: which one this is.
    init_timeout: seconds to wait for the others.

  Raises:
    UserError: the arguments are incomplete.
    RunError: the others did not come in time.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(x is not None for x in given) and None in given:
    raise errors.UserError(
      '--coordinator_address, --num_processes, --process_id: give all three '
      'or none'
    )
  if coordinator_address is None and not launched_together(os.environ):
    return
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=init_timeout,
    )
  except (RuntimeError, ValueError) as e:
    reason = str(e).strip().splitlines()[0]
    raise errors.RunError(
      f'not all processes joined within --init_timeout={init_timeout} s: '
      f'{reason}'
    ) from e
  _log.info('process %d of %d', jax.process_index(), jax.process_count())


def launched_together(env) -> bool:
  """Whether a launcher that jax knows started several processes."""
  return (
    int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ('JOBSET_NAME' in env and 'JOB_COMPLETION_INDEX' in env)
    or 'MEGASCALE_COORDINATOR_ADDRESS' in env
    or _on_cloud_tpu()
  )


def is_main() -> bool:
  """Whether this process writes the files all share."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def _on_cloud_tpu() -> bool:
  """Whether this is a Cloud TPU VM, where jax asks the metadata server."""
  return any(pathlib.Path('/dev').glob('accel[0-9]*')) or (
    pathlib.Path('/dev/vfio/0').exists() and 'TPU_NAME' in os.environ
  )
