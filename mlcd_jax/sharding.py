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
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh; -1 on one axis takes the devices the other leaves.

  Args:
    data: size of the "data" axis.
    fsdp: size of the "fsdp" axis.
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
  # Linen annotates arrays as Auto meshes expect; Explicit is jax's default.
  return Mesh(
    np.asarray(devices).reshape(sizes),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
  """Returns the NamedSharding of every array of a train state.

  A rule matches the end of an array's path, so that it holds for a parameter
  and for its optimizer moments alike.
  """

  def sharding(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = _spec(name, array.shape, mesh.shape['fsdp'])
    _check_divisible(name, array.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Makes global arrays of this host's rows, split over every device."""
  sharding = NamedSharding(mesh, BATCH)
  return {
    k: jax.make_array_from_process_local_data(sharding, v)
    for k, v in batch.items()
  }


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


def _check_divisible(
  name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  for size, axes in zip(shape, spec):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = int(np.prod([mesh.shape[a] for a in axes]))
    if size % parts:
      raise ValueError(
        f'{name} {list(shape)}: {size} does not divide over the {parts} '
        f'devices of mesh axes {axes}'
      )
