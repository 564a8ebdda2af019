"""What a run says of itself before it trains, and after it ended."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from mlcd_jax import train_step

_MAX_DEPTH = 2  # Names of a path that make a row of the table.


def devices(mesh: Mesh) -> str:
  """Returns such as '8 TPU v5 lite, mesh data 4 x fsdp 2, 2 processes'."""
  processes = jax.process_count()
  return (
    f'{mesh.size} {mesh.devices.flat[0].device_kind}, mesh '
    + ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
    + f', {processes} process{"es" * (processes > 1)}'
  )


def parameters(program: train_step.Program) -> str:
  """A table of the parameters and the memory their state takes.

  Args:
    program: whose abstract state is looked at; no array is made.

  Returns:
    Lines with the number of parameters of each part, how it is split, and the
    bytes that parameters, optimizer and average take on a device.
  """
  state = program.abstract_state
  rows = {}
  for path, x in jax.tree_util.tree_leaves_with_path(state.params):
    name = '/'.join(key.key for key in path[:_MAX_DEPTH])
    count, splits = rows.get(name, (0, {}))
    spec = ', '.join(map(str, x.sharding.spec)) or 'replicated'
    rows[name] = count + math.prod(x.shape), splits | {spec: None}
  lines = [
    (name, f'{count:,}', '; '.join(splits))
    for name, (count, splits) in rows.items()
  ]
  total = sum(count for count, _ in rows.values())
  lines.append(('all', f'{total:,}', f'{_gib(state)} GiB of state a device'))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join(
    f'  {name.ljust(widths[0])}  {count.rjust(widths[1])}  {spec}'
    for name, count, spec in lines
  )


def _gib(state: Any) -> str:
  """What one device holds of the state."""
  size = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(state)
  )
  return f'{size / 2**30:.3f}'


def places(workdir: pathlib.Path, folders: Mapping[str, pathlib.Path]) -> str:
  """Returns a line for each thing that the run left, and where it lies."""
  found = {
    **folders,
    'curves': workdir / 'metrics.jsonl',
    'results': workdir / 'results.json',
    'page': workdir / 'report.html',
  }
  return '\n'.join(
    f'  {name:<9} {path}' for name, path in found.items() if path.exists()
  )
