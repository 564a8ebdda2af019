"""The mesh, the one table of PartitionSpecs, and batches onto devices.

One mesh serves all stages, with axes ("data", "fsdp"). Batches and class
centers are split over both, k-means points over `data`, k-means centers over
`fsdp`, and the encoder's weights over `fsdp`.
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

# Encoder arrays below this many elements are replicated: gathering them would
# cost more than it saves.
_MIN_FSDP_SIZE = 2**16


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  *,
  slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh; -1 on one axis takes the devices the other leaves.

  Args:
    data: size of the "data" axis.
    fsdp: size of the "fsdp" axis; it stays within a slice.
    slices: parts of "data" between which the network is slow, such as several
      TPU slices; devices without a slice of their own are cut evenly.
    devices: all of jax's where not given.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp]
  if -1 in sizes:
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
  # Linen annotates arrays as Auto meshes expect; Explicit is jax's default.
  return Mesh(
    np.concatenate(
      [
        # A slice's own axes, such as 16 x 16, may be cut for one of ours.
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
  """The devices of each slice, in order."""
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

  A rule matches the end of an array's path, so that it holds for a parameter
  and for its optimizer moments alike.
  """

  def sharding(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = _spec(name, array.shape, mesh.shape['fsdp'])
    _check(name, array.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Which rows of a global batch lie on this host's devices, ascending.

  They need not follow each other: meshes of slices interleave their hosts.
  """
  if jax.process_count() == 1:
    return np.arange(num_rows)
  batch = NamedSharding(mesh, BATCH)
  parts = batch.addressable_devices_indices_map((num_rows,)).values()
  return np.sort(np.concatenate([np.arange(num_rows)[part] for part in parts]))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Makes global arrays of this host's `own_rows`, split over every device.

  Row i of an array is row i of the global batch.
  """
  sharding = NamedSharding(mesh, BATCH)
  return {
    k: jax.make_array_from_process_local_data(sharding, v)
    for k, v in batch.items()
  }


def all_rows(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
  """Joins every host's `own_rows` of a global batch, in order."""
  if jax.process_count() == 1:
    return rows
  return to_host(put_batch(mesh, {'rows': rows})['rows'])


def to_host(x: jax.Array) -> np.ndarray:
  """The whole array on this host, from every process."""
  if not (x.is_fully_addressable or x.is_fully_replicated):
    replicated = NamedSharding(x.sharding.mesh, REPLICATED)
    x = jax.jit(_as_it_is, out_shardings=replicated)(x)
  return np.asarray(x)


def on_cpu(mesh: Mesh) -> bool:
  """Returns whether the devices of a mesh are CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def put(mesh: Mesh, spec: PartitionSpec, arrays: Any) -> Any:
  """Makes global arrays of what every host has whole."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, lambda index: np.asarray(x)[index]
    ),
    arrays,
  )


def _as_it_is(x: jax.Array) -> jax.Array:
  """Has a name so that it is compiled once a shape."""
  return x


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The table: first rule that matches the name wins."""
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
  """Returns such as '8 TPU v5 lite, mesh data 4 x fsdp 2, 2 processes'."""
  processes = jax.process_count()
  return (
    f'{mesh.size} {mesh.devices.flat[0].device_kind}, mesh '
    + ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
    + f', {processes} process{"es" * (processes > 1)}'
  )
