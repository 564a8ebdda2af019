"""Several processes: finding each other, and waiting for each other."""

import collections
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import json
import logging
import os
import re
import socket
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import watchdog

_log = logging.getLogger(__name__)


# How much later than `peers` jaxlib gives a process up, by aborting.
_JAXLIB_PATIENCE = 2

# Of what is put into the store at once: gRPC's own bound of a message is 4 MB.
_PART_BYTES = 2**20
# Signals are handled between two looks at the store.
_LOOK_MILLISECONDS = 1_000

_decided = collections.Counter()  # Times that a name was decided.


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  init_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the run's processes; call before any other use of jax.

  Without arguments the launcher is asked: TPU pods, Slurm, Open MPI and
  Kubernetes JobSets are detected, anything else is one process.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: how many there are.
    process_id: which one this is.
    init_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds without a sign of life after which a process is
      lost.

  Raises:
    UserError: the arguments are incomplete or wrong.
    RunError: the others did not come in time.
  """
  _check(coordinator_address, num_processes, process_id)
  _check_seconds('init_timeout', init_timeout)
  _check_seconds('heartbeat_timeout', heartbeat_timeout)
  if coordinator_address is None and not launched_together(os.environ):
    return
  # SIGTERM is `interrupt`'s; jax's service would take it away.
  jax.config.update('jax_enable_preemption_service', False)
  said = []
  try:
    with _informative_jaxlib(init_timeout), _stderr_copied_to(said):
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        # Longer than process 0 waits, so that its answer comes.
        initialization_timeout=init_timeout + 5,
        heartbeat_timeout_seconds=_JAXLIB_PATIENCE * heartbeat_timeout,
      )
  except (RuntimeError, ValueError) as e:
    raise errors.RunError(_why_not_joined(init_timeout, said, e)) from e
  if alone_on_host(os.environ):
    for platform in ('cuda', 'rocm'):
      jax.config.update(f'jax_{platform}_visible_devices', 'all')
  watchdog.start(
    jax._src.distributed.global_state.client,
    jax.process_index(),
    jax.process_count(),
    heartbeat_timeout,
  )
  _log.info('process %d of %d', jax.process_index(), jax.process_count())


def shutdown() -> None:
  """Leaves the other processes, when all are done."""
  if jax.distributed.is_initialized():
    barrier('done')
    watchdog.stop()
    jax.distributed.shutdown()


def agreement(mesh: Mesh) -> Callable[[int], int]:
  """Returns a question that all processes ask together, again and again.

  The answer is the greatest number that any process brings. With several
  processes it is that to the question before: so nobody waits for it, and
  everybody has the same.

  Args:
    mesh: of all devices.
  """
  if jax.process_count() == 1:
    return lambda number: number
  everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  greatest = jax.jit(
    lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  asked = []

  def ask(number: int) -> int:
    numbers = jax.make_array_from_callback(
      (mesh.size,), everywhere, lambda _: np.array([number], np.int32)
    )
    asked.append(greatest(numbers))
    return int(asked.pop(0)) if len(asked) > 1 else 0

  return ask


def _check(
  address: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises UserError naming the flag that cannot be used."""
  given = (address, num_processes, process_id)
  if given == (None, None, None):
    return
  if None in given:
    raise errors.UserError(
      '--coordinator_address, --num_processes, --process_id: give all three '
      'or none'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise errors.UserError(
      f'--coordinator_address={address}: needs HOST:PORT, such as '
      '10.0.0.1:12345'
    )
  if num_processes < 1:
    raise errors.UserError(f'--num_processes={num_processes}: use at least 1')
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
      f'--process_id={process_id}: with --num_processes={num_processes} use '
      f'0 to {num_processes - 1}'
    )
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except OSError as e:
    raise errors.UserError(
      f'--coordinator_address={address}: {host} is unknown here '
      f'({e.strerror}); name the host of process 0, or give its IP address'
    ) from e


def _check_seconds(flag: str, value: int) -> None:
  if value < 1:
    raise errors.UserError(f'--{flag}={value}: use at least 1 second')


@contextlib.contextmanager
def _informative_jaxlib(init_timeout: int) -> Iterator[None]:
  """Sets what jax.distributed.initialize has no arguments for.

  Process 0 gives up first and knows who is absent, instead of after an hour;
  and a lost connection ends in SIGABRT, which `peers` handles, without a
  stack trace: jaxlib cannot pass its status to any Python function.
  """
  lib = jax._src.distributed._jax
  service = lib.get_distributed_runtime_service
  client = lib.get_distributed_runtime_client
  lib.get_distributed_runtime_service = functools.partial(
    service, cluster_register_timeout=init_timeout
  )
  lib.get_distributed_runtime_client = functools.partial(
    client, missed_heartbeat_callback=lambda status: None
  )
  try:
    yield
  finally:
    lib.get_distributed_runtime_service = service
    lib.get_distributed_runtime_client = client


@contextlib.contextmanager
def _stderr_copied_to(said: list[str]) -> Iterator[None]:
  """Appends what is written to stderr inside, jaxlib's lines too."""
  with tempfile.TemporaryFile() as held:
    before = os.dup(2)
    os.dup2(held.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(before, 2)
      os.close(before)
      held.seek(0)
      said.append(held.read().decode('utf-8', 'replace'))
      os.write(2, said[0].encode())


def _why_not_joined(init_timeout: int, said: list[str], e: Exception) -> str:
  """One line, with the absent processes where jaxlib said which."""
  if 'Failed to start RPC server' in str(e):
    return (
      'the port of --coordinator_address is in use on this host; choose '
      'another one'
    )
  line = f'not all processes joined within --init_timeout={init_timeout} s: '
  absent = re.search(r'timed out task names:\s*([\d\s,]+)', ''.join(said))
  if absent:
    indices = sorted({int(i) for i in re.findall(r'\d+', absent[1])})
    return line + 'absent: process ' + ', '.join(map(str, indices))
  return line + (
    'process 0 did not answer, or waited for others in vain; its own error '
    'says for which'
  )


def launched_together(env) -> bool:
  """Whether a launcher that jax knows started several processes."""
  return (
    int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ('JOBSET_NAME' in env and 'JOB_COMPLETION_INDEX' in env)
    or 'MEGASCALE_COORDINATOR_ADDRESS' in env
    or _on_cloud_tpu(env)
  )


def alone_on_host(env) -> bool:
  """Whether Slurm or Open MPI started one process on each host.

  jax gives every process of theirs the one GPU of its place on the host, which
  leaves the others of the host unused where there is one process.
  """
  return (
    env.get('SLURM_STEP_TASKS_PER_NODE', '').partition('(')[0] == '1'
    or env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  )


def is_main() -> bool:
  """Whether this process writes the files all share."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def decide(name: str, value: Callable[[], Any]) -> Any:
  """Returns what process 0 finds, in all processes.

  Whatever decides whether a collective is entered must be the same everywhere,
  and files are not: a host may see an older state of a shared folder, or none.
  All processes must call it, in any order of the names. It is no collective
  of the devices, and process 0 does not wait for the others.

  Args:
    name: of what is decided; the n-th call with a name is its own.
    value: called in process 0 alone; gives JSON.
  """
  if jax.process_count() == 1:
    return value()
  store = jax._src.distributed.global_state.client
  key = f'mlcd_jax/decided/{name}/{_decided[name]}'
  _decided[name] += 1
  if is_main():
    text = json.dumps(value())
    starts = range(0, len(text), _PART_BYTES)
    for part, start in enumerate(starts):
      store.key_value_set(f'{key}/{part}', text[start : start + _PART_BYTES])
    store.key_value_set(key, str(len(starts)))
  else:
    parts = range(int(_look_up(store, key)))
    text = ''.join(_look_up(store, f'{key}/{part}') for part in parts)
  return json.loads(text)  # A tuple is a list to all of them.


def check_same(name: str, value: Callable[[], Any], what: str) -> None:
  """Raises RunError in a process that finds another value than process 0.

  Args:
    name: see `decide`.
    value: called in every process of several; gives JSON.
    what: the file or field, for the error.
  """
  if jax.process_count() == 1:
    return
  own = value()
  if decide(name, lambda: own) != own:
    raise errors.RunError(
      f'{what}: not the same on {socket.gethostname()} as on the host of '
      'process 0; all hosts must see the same files'
    )


def _look_up(store: Any, key: str) -> str:
  """Waits for a key as long as it takes."""
  while True:
    try:
      return store.blocking_key_value_get(key, _LOOK_MILLISECONDS)
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise


def _on_cloud_tpu(env) -> bool:
  """Whether jax found TPUs here that other hosts may have a part of.

  Alone are hosts that say so, as Colab's do; elsewhere jax asks the metadata
  server. The chips are of `vfio` on v5e, v5p and v6e, of `accel` before.
  """
  hosts = env.get('TPU_WORKER_HOSTNAMES', '').split(',')
  alone = len(hosts) == 1 and hosts[0] != ''
  return jax._src.cloud_tpu_init.running_in_cloud_tpu_vm and not alone
