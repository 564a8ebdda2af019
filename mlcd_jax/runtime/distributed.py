"""Start-up, agreement and barriers of a run with several processes."""

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


# jaxlib aborts after this many heartbeat timeouts; `watchdog` acts after one,
# so that it reports the lost process first.
_JAXLIB_PATIENCE = 2

# Characters in one value of the store. JSON is ASCII, so a part is 1 MiB, under
# gRPC's default limit of 4 MiB for a message.
_PART_BYTES = 2**20
# Python handles signals only between two waits for the store.
_LOOK_MILLISECONDS = 1_000

# How often each name was decided; it makes the keys in the store unique.
_decided = collections.Counter()


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  init_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the processes of the run; call it before any other use of jax.

  Without an address the launcher is detected: a TPU pod, Slurm, Open MPI or a
  Kubernetes JobSet. Without a launcher the run has one process.

  Args:
    coordinator_address: the host:port of process 0.
    num_processes: the number of processes.
    process_id: the index of this process.
    init_timeout: the seconds to wait for the other processes.
    heartbeat_timeout: the seconds without a heartbeat after which a process
      counts as lost.

  Raises:
    UserError: the arguments are incomplete or wrong.
    RunError: the processes did not all join in time.
  """
  _check(coordinator_address, num_processes, process_id)
  _check_seconds('init_timeout', init_timeout)
  _check_seconds('heartbeat_timeout', heartbeat_timeout)
  if coordinator_address is None and not launched_together(os.environ):
    return
  # `signals` handles SIGTERM; jax's preemption service would replace it.
  jax.config.update('jax_enable_preemption_service', False)
  said = []
  try:
    with _informative_jaxlib(init_timeout), _stderr_copied_to(said):
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        # The others wait 5 s longer than process 0, so that they receive its
        # error, which names the absent processes.
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
  """Waits until all processes are done, then disconnects from them."""
  if jax.distributed.is_initialized():
    barrier('done')
    watchdog.stop()
    jax.distributed.shutdown()


def agreement(mesh: Mesh) -> Callable[[int], int]:
  """Returns a function that gives all processes the same maximum.

  All processes call the function together, each with its own number. With
  several processes it returns the maximum of the previous call, and 0 at the
  first, so that no process waits for the device.

  Args:
    mesh: the mesh of all devices.
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
  """Raises a UserError if the three flags are incomplete or wrong."""
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
  """Raises a UserError if a flag for a time is below 1 second."""
  if value < 1:
    raise errors.UserError(f'--{flag}={value}: use at least 1 second')


@contextlib.contextmanager
def _informative_jaxlib(init_timeout: int) -> Iterator[None]:
  """Sets two options that jax.distributed.initialize does not expose.

  Process 0 waits `init_timeout` seconds for the others instead of an hour, and
  its error names the absent ones. A lost connection ends in SIGABRT, which
  `watchdog` catches: jaxlib fails to pass its status to the Python callback.
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
  """Appends the text that the block writes to stderr to `said`.

  It works on the file descriptor, so that it includes jaxlib's own lines. The
  text appears on stderr when the block ends.
  """
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
  """Returns one line that names the absent processes if jaxlib listed them."""
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
  """Returns whether a launcher that jax detects started several processes."""
  return (
    int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
    or ('JOBSET_NAME' in env and 'JOB_COMPLETION_INDEX' in env)
    or 'MEGASCALE_COORDINATOR_ADDRESS' in env
    or _on_cloud_tpu(env)
  )


def alone_on_host(env) -> bool:
  """Returns whether Slurm or Open MPI started one process on each host.

  With these launchers jax gives each process one GPU, by its index on the
  host. A single process on the host would leave the other GPUs unused.
  """
  return (
    env.get('SLURM_STEP_TASKS_PER_NODE', '').partition('(')[0] == '1'
    or env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  )


def is_main() -> bool:
  """Returns whether this process is the one that writes the shared files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes have reached the barrier of this name."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def decide(name: str, value: Callable[[], Any]) -> Any:
  """Returns the value of process 0 in all processes.

  All processes must agree on whether to enter a collective. They cannot decide
  it from files, since a host may see an older state of a shared folder. All
  processes must call `decide`, in any order of the names. It uses no devices,
  and process 0 does not wait for the others.

  Args:
    name: the name of the decision; the n-th calls with one name belong
      together.
    value: returns a JSON value; only process 0 calls it.
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
  # Process 0 parses its own text too, so that a tuple is a list everywhere.
  return json.loads(text)


def check_same(name: str, value: Callable[[], Any], what: str) -> None:
  """Checks that this process has the same value as process 0.

  Args:
    name: the name of the check, as in `decide`.
    value: returns a JSON value; a run with one process does not call it.
    what: the file or field that the error names.

  Raises:
    RunError: the values differ.
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
  """Waits for a key of the store without a time limit; returns its value."""
  while True:
    try:
      return store.blocking_key_value_get(key, _LOOK_MILLISECONDS)
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise


def _on_cloud_tpu(env) -> bool:
  """Returns whether this is a TPU host that may belong to a larger slice.

  A host with exactly one name in TPU_WORKER_HOSTNAMES, as on Colab, is alone.
  For all others jax asks the metadata server about the slice.
  """
  hosts = env.get('TPU_WORKER_HOSTNAMES', '').split(',')
  alone = len(hosts) == 1 and hosts[0] != ''
  return jax._src.cloud_tpu_init.running_in_cloud_tpu_vm and not alone
