"""What must divide over the devices."""

import pytest

from mlcd_jax.config import mesh as mesh_lib
from mlcd_jax.runtime import errors


def test_what_must_divide_over_the_devices(tiny_config):
  assert mesh_lib.from_config(tiny_config).size == 8
  tiny_config.train.accumulate_steps = 8
  with pytest.raises(errors.UserError, match='train.accumulate_steps=8'):
    mesh_lib.from_config(tiny_config)
  tiny_config.train.accumulate_steps = 1
  tiny_config.train.batch_size = 30
  with pytest.raises(errors.UserError, match='train.batch_size=30'):
    mesh_lib.from_config(tiny_config)


def test_batches_of_tasks_that_do_not_run_need_not_divide(tiny_config):
  tiny_config.evaluate.finetune_batch_size = 12
  tiny_config.evaluate.tasks = ('linear',)
  assert mesh_lib.from_config(tiny_config).size == 8
  tiny_config.evaluate.tasks = ('finetune',)
  with pytest.raises(errors.UserError, match='finetune_batch_size=12'):
    mesh_lib.from_config(tiny_config)
