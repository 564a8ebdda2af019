"""The device mesh of a config."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.runtime import errors


def from_config(
  config: ml_collections.ConfigDict,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh of a config and checks that the batches divide over it.

  Args:
    config: the config of the run.
    devices: the devices of the mesh; without them, all devices.

  Raises:
    UserError: the mesh does not fit the devices, or a batch does not divide.
  """
  c = config.mesh
  try:
    mesh = sharding.make_mesh(c.data, c.fsdp, slices=c.slices, devices=devices)
  except ValueError as e:
    raise errors.UserError(str(e)) from e
  parts = config.train.accumulate_steps
  if config.train.batch_size % (parts * mesh.size):
    raise errors.UserError(
      f'train.batch_size={config.train.batch_size} is not divisible by '
      + f'train.accumulate_steps={parts} times ' * (parts > 1)
      + f'the {mesh.size} devices'
    )
  names = ['batch_size']
  if 'finetune' in config_lib.tasks(config):
    names.append('finetune_batch_size')
  for name in names:
    size = config.evaluate[name]
    if size % mesh.size:
      raise errors.UserError(
        f'evaluate.{name}={size} is not divisible by the {mesh.size} devices'
      )
  return mesh
