"""The mesh, and the table of PartitionSpecs."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mlcd_jax import sharding


def test_the_rest_goes_to_the_axis_left_open():
  assert dict(sharding.make_mesh(-1, 2).shape) == {'data': 4, 'fsdp': 2}
  assert dict(sharding.make_mesh(2, -1).shape) == {'data': 2, 'fsdp': 4}
  with pytest.raises(ValueError, match='mesh.data=3'):
    sharding.make_mesh(3, 2)


def test_slices_lie_along_data_and_fsdp_stays_within_one():
  class Chip:
    platform, device_kind, process_index = 'cpu', 'cpu', 0

    def __init__(self, i):
      self.id, self.slice_index = i, i % 2  # Slices are interleaved.

  parts = sharding._by_slice([Chip(i) for i in range(8)], 2)
  assert [[c.id for c in part] for part in parts] == [
    [0, 2, 4, 6],
    [1, 3, 5, 7],
  ]
  with pytest.raises(ValueError, match='devices are in 2 slices'):
    sharding._by_slice([Chip(i) for i in range(8)], 4)
  mesh = sharding.make_mesh(4, 2, slices=2)
  ids = np.vectorize(lambda d: d.id)(mesh.devices)
  assert set(ids[:2].flat) == {0, 1, 2, 3}
  with pytest.raises(ValueError, match='mesh.slices=3'):
    sharding.make_mesh(4, 2, slices=3)


@pytest.mark.parametrize(
  ('kind', 'slice_shape'),
  [
    ('TPU v5 lite', (16, 16, 1)),
    ('TPU v6 lite', (8, 16, 1)),
    ('TPU v5', (4, 4, 4)),
    ('TPU v5', (4, 4, 12)),
  ],
)
def test_every_split_of_a_tpu_slice(kind, slice_shape):
  class Chip:
    platform, device_kind, core_on_chip, slice_index = 'tpu', kind, 0, 0

    def __init__(self, i, coords):
      self.id, self.coords = i, coords
      self.process_index = i // 4

  chips = [Chip(i, at) for i, at in enumerate(np.ndindex(slice_shape))]
  for fsdp in range(1, len(chips) + 1):
    if len(chips) % fsdp == 0:
      mesh = sharding.make_mesh(-1, fsdp, devices=chips)
      assert mesh.shape['fsdp'] == fsdp
      assert {c.id for c in mesh.devices.flat} == set(range(len(chips)))


def test_specs_hold_for_parameters_and_their_moments_alike():
  mesh = sharding.make_mesh(2, 4)
  big = jax.ShapeDtypeStruct((512, 1_024), np.float32)
  state = {
    'params': {
      'kernel': big,
      'bias': jax.ShapeDtypeStruct((512,), np.float32),
      'odd': jax.ShapeDtypeStruct((333, 1_001), np.float32),
      'classifier': {'weight': big},
    }
  }
  state['mu'] = state['params']
  specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(mesh, state))
  assert specs['mu'] == specs['params']
  assert specs['params'] == {
    'kernel': PartitionSpec(None, 'fsdp'),
    'bias': sharding.REPLICATED,
    'odd': sharding.REPLICATED,
    'classifier': {'weight': sharding.CLASSES},
  }


def test_errors_name_the_parameter():
  mesh = sharding.make_mesh(2, 4)
  odd = {'classifier': {'weight': jax.ShapeDtypeStruct((1_001, 8), np.float32)}}
  with pytest.raises(ValueError, match='classifier/weight .*1001'):
    sharding.state_shardings(mesh, odd)
  with pytest.raises(ValueError, match='kernel .*twice'):
    sharding._check(
      'kernel', (8, 8), PartitionSpec('fsdp', ('data', 'fsdp')), mesh
    )


def test_one_process_has_all_rows_of_a_batch():
  mesh = sharding.make_mesh()
  rows = np.arange(24).reshape(8, 3)
  assert sharding.own_rows(mesh, 8).tolist() == list(range(8))
  assert sharding.all_rows(mesh, rows) is rows
  array = sharding.put_batch(mesh, {'rows': rows})['rows']
  np.testing.assert_array_equal(sharding.to_host(array), rows)
