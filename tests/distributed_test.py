"""Launchers that started several processes are recognised."""

import pytest

from mlcd_jax import distributed
from mlcd_jax import errors


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


def test_flags_come_together():
  with pytest.raises(errors.UserError, match='all three'):
    distributed.initialize(num_processes=2)
