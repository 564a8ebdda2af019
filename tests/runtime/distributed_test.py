"""Launchers that started several processes are recognised."""

import jax
import pytest

from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors


@pytest.mark.parametrize(
  ('env', 'expected'),
  [
    ({}, False),
    ({'SLURM_NTASKS': '4'}, False),  # A shell inside an allocation.
    ({'SLURM_STEP_NUM_TASKS': '1'}, False),
    ({'SLURM_STEP_NUM_TASKS': '4'}, True),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ({'JOBSET_NAME': 'a', 'JOB_COMPLETION_INDEX': '0'}, True),
    ({'KUBERNETES_SERVICE_HOST': 'x'}, False),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'x'}, True),
  ],
)
def test_launched_together(env, expected):
  assert distributed.launched_together(env) == expected


@pytest.mark.parametrize(
  ('env', 'expected'),
  [
    ({}, True),  # A Cloud TPU VM, of one host or several.
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
  ],
)
def test_tpus_are_found_as_jax_finds_them(monkeypatch, env, expected):
  monkeypatch.setattr(jax._src.cloud_tpu_init, 'running_in_cloud_tpu_vm', True)
  assert distributed.launched_together(env) == expected


@pytest.mark.parametrize(
  ('env', 'expected'),
  [
    ({}, False),
    ({'SLURM_STEP_TASKS_PER_NODE': '1'}, True),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x16)'}, True),
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, False),
    ({'SLURM_STEP_TASKS_PER_NODE': '1,2'}, False),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, True),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}, False),
  ],
)
def test_alone_on_host(env, expected):
  assert distributed.alone_on_host(env) == expected


def test_flags_come_together():
  with pytest.raises(errors.UserError, match='all three'):
    distributed.initialize(num_processes=2)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (('nowhere', 2, 0), '--coordinator_address=nowhere: needs HOST:PORT'),
    (('host:', 2, 0), '--coordinator_address=host:: needs HOST:PORT'),
    (('host:99999', 2, 0), '--coordinator_address=host:99999: needs'),
    (('no-such-host.invalid:1234', 2, 0), 'is unknown here'),
    (('127.0.0.1:1234', 0, 0), '--num_processes=0: use at least 1'),
    (('127.0.0.1:1234', 2, 2), '--process_id=2: .*use 0 to 1'),
    (('127.0.0.1:1234', 2, -1), '--process_id=-1: .*use 0 to 1'),
  ],
)
def test_flags_that_cannot_be(flags, says):
  address, num_processes, process_id = flags
  with pytest.raises(errors.UserError, match=says):
    distributed.initialize(
      coordinator_address=address,
      num_processes=num_processes,
      process_id=process_id,
    )
