"""A table of the parameters that a run trains."""

import math
from typing import Any

import jax

from mlcd_jax.train import step

_MAX_DEPTH = 2  # Names of a path that make a row of the table.


def parameters(program: step.Program) -> str:
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
