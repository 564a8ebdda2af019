"""The device mesh, the PartitionSpecs and the transfer of arrays to devices.

All stages use one mesh with the axes ("data", "fsdp"). Batches and class
centers are sharded over both axes, k-means points over `data`, and k-means
centers and encoder weights over `fsdp`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ('data', 'fsdp')
REPLICATED = PartitionSpec()
BATCH = PartitionSpec(AXES)
CLASSES = PartitionSpec(AXES, None)  # Class centers [C, D].
POINTS = PartitionSpec('data')  # k-means rows [N, D].
CENTERS = PartitionSpec('fsdp')  # k-means centers [K, D].

# Encoder arrays with fewer elements (256 KiB in float32) are replicated:
# gathering them would cost more than sharding them saves.
_MIN_FSDP_SIZE = 2**16


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  *,
  slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh; a size of -1 is inferred from the number of devices.

  Args:
    data: the size of the "data" axis.
    fsdp: the size of the "fsdp" axis. It never crosses slices.
    slices: the number of parts of the "data" axis that are joined by a slow
      network, such as TPU slices. If all devices report the same slice or
      none, they are cut evenly.
    devices: the devices to use; all of JAX's by default.

  Raises:
    ValueError: the product of the sizes is not the number of devices, `slices`
      does not divide `data`, or the devices lie in another number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp]
  if -1 in sizes:
    # One -1 makes the product negative; two cannot be inferred and fail below.
    rest = len(devices) // max(1, -np.prod(sizes)) if sizes != [-1, -1] else 0
    sizes[sizes.index(-1)] = int(rest)
  if np.prod(sizes) != len(devices):
    raise ValueError(
      f'mesh.data={data} and mesh.fsdp={fsdp} do not fit {len(devices)} devices'
    )
  if sizes[0] % slices:
    raise ValueError(
      f'mesh.slices={slices} does not divide mesh.data={sizes[0]}'
    )
  within = (sizes[0] // slices, sizes[1])
  # Linen annotates arrays for Auto axes; jax's default is Explicit.
  return Mesh(
    np.concatenate(
      [
        # A physical axis, such as one of 16 x 16, may have to be split to
        # give a mesh axis its size.
        mesh_utils.create_device_mesh(
          within, part, allow_split_physical_axes=True
        )
        for part in _by_slice(devices, slices)
      ]
    ),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def _by_slice(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
  """Groups the devices by slice, in order of the slice index."""
  if slices == 1:
    return [devices]
  found = {}
  for device in devices:
    found.setdefault(getattr(device, 'slice_index', None), []).append(device)
  if len(found) == 1:
    size = len(devices) // slices
    return [devices[i * size : (i + 1) * size] for i in range(slices)]
  if len(found) != slices:
    raise ValueError(
      f'mesh.slices={slices}, but the devices are in {len(found)} slices'
    )
  return [found[index] for index in sorted(found)]


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
  """Returns the NamedSharding of every array of a train state.

  A rule matches the end of an array's path, so it applies to a parameter and
  to its optimizer moments alike.

  Args:
    mesh: the mesh of all devices.
    abstract_state: a tree of arrays or shapes.

  Raises:
    ValueError: an axis of an array is not divisible by its mesh axes.
  """

  def sharding(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = _spec(name, array.shape, mesh.shape['fsdp'])
    _check(name, array.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Returns the ascending indices of the batch rows on this host's devices.

  The indices need not be contiguous: a mesh of several slices interleaves the
  hosts.
  """
  if jax.process_count() == 1:
    return np.arange(num_rows)
  batch = NamedSharding(mesh, BATCH)
  parts = batch.addressable_devices_indices_map((num_rows,)).values()
  return np.sort(np.concatenate([np.arange(num_rows)[part] for part in parts]))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Makes global arrays, sharded over every device, from this host's rows.

  Args:
    mesh: the mesh of all devices.
    batch: arrays [b, ...] with the rows of the global batch that `own_rows`
      names, in that order.
  """
  sharding = NamedSharding(mesh, BATCH)
  return {
    k: jax.make_array_from_process_local_data(sharding, v)
    for k, v in batch.items()
  }


def all_rows(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
  """Gathers the rows of all hosts into the global batch, on every host."""
  if jax.process_count() == 1:
    return rows
  return to_host(put_batch(mesh, {'rows': rows})['rows'])


def to_host(x: jax.Array) -> np.ndarray:
  """Copies the whole array to this host; all processes must call it."""
  if not (x.is_fully_addressable or x.is_fully_replicated):
    replicated = NamedSharding(x.sharding.mesh, REPLICATED)
    x = jax.jit(_as_it_is, out_shardings=replicated)(x)
  return np.asarray(x)


def on_cpu(mesh: Mesh) -> bool:
  """Returns whether the devices of a mesh are CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def put(mesh: Mesh, spec: PartitionSpec, arrays: Any) -> Any:
  """Makes global arrays from a tree of which every host has a full copy."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, lambda index: np.asarray(x)[index]
    ),
    arrays,
  )


def _as_it_is(x: jax.Array) -> jax.Array:
  """Returns its argument; unlike a lambda, it is compiled once per shape."""
  return x


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """Returns the PartitionSpec for an array; the first matching rule wins."""
  if re.search(r'classifier/weight$', name):
    return CLASSES
  if np.prod(shape) < _MIN_FSDP_SIZE or fsdp == 1:
    return REPLICATED
  divisible = [d for d, size in enumerate(shape) if size % fsdp == 0]
  if not divisible:
    return REPLICATED
  largest = max(divisible, key=lambda d: shape[d])
  return PartitionSpec(
    *('fsdp' if d == largest else None for d in range(len(shape)))
  )


def _check(
  name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  """Raises ValueError if a spec does not fit an array of the given shape."""
  used = [
    a
    for axes in spec
    for a in ([axes] if isinstance(axes, str) else axes or ())
  ]
  if len(used) != len(set(used)):
    raise ValueError(f'{name} {list(shape)}: {spec} uses a mesh axis twice')
  for size, axes in zip(shape, spec):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = int(np.prod([mesh.shape[a] for a in axes]))
    if size % parts:
      raise ValueError(
        f'{name} {list(shape)}: {size} does not divide over the {parts} '
        f'devices of mesh axes {axes}'
      )


def describe(mesh: Mesh) -> str:
  """Returns a line like '8 TPU v5 lite, mesh data 4 x fsdp 2, 2 processes'."""
  processes = jax.process_count()
  return (
    f'{mesh.size} {mesh.devices.flat[0].device_kind}, mesh '
    + ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
    + f', {processes} process{"es" * (processes > 1)}'
  )
