"""A table of the parameters that a run trains, for the log."""

import math
from typing import Any

import jax

from mlcd_jax.train import step

# Parameters whose paths share so many leading names form a row of the table.
_MAX_DEPTH = 2


def parameters(program: step.Program) -> str:
  """Returns a table of the parameters and the memory that the state takes.

  Args:
    program: the program of the run. Only its abstract state is read; no array
      is made.

  Returns:
    One line per part with its number of parameters and its shardings, then a
    line with the total and the GiB of the whole state on one device.
  """
  state = program.abstract_state
  rows = {}
  for path, x in jax.tree_util.tree_leaves_with_path(state.params):
    name = '/'.join(key.key for key in path[:_MAX_DEPTH])
    count, splits = rows.get(name, (0, {}))
    spec = ', '.join(map(str, x.sharding.spec)) or 'replicated'
    # The keys of a dict keep the order of the shardings, unlike a set.
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
  """Returns the size of one device's part of the state in GiB, as text."""
  size = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(state)
  )
  return f'{size / 2**30:.3f}'
