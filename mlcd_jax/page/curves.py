"""metrics.jsonl as columns for charts."""

import pathlib
from typing import Any

from mlcd_jax.runtime import files

_MAX_POINTS = 1_000


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns every curve with at most a thousand points.

  A point is what was logged at that step; where there are too many, some are
  left out, and the last one stays.

  Args:
    workdir: of the run.

  Returns:
    `step`: [n]; `values`: name -> [n], None where a step has none.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return {'step': [], 'values': {}}
  lines = path.read_bytes().splitlines()
  every = -(-len(lines) // _MAX_POINTS) or 1
  kept = lines[(len(lines) - 1) % every :: every] if lines else []
  rows = [
    row
    for _, row in files.parse_lines(kept)
    if isinstance(row, dict) and isinstance(row.get('step'), int)
  ]
  names = dict.fromkeys(n for row in rows for n in row if n != 'step')
  return {
    'step': [row['step'] for row in rows],
    'values': {name: [row.get(name) for row in rows] for name in names},
  }
