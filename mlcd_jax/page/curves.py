"""The curves of metrics.jsonl, by column, for the page's charts."""

import pathlib
from typing import Any

from mlcd_jax.runtime import files

# Bounds the size of the page; a chart is 360 units wide (charts.js).
_MAX_POINTS = 1_000


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns every curve with at most a thousand points.

  A point is a logged value, not an average. From a longer log it takes every
  n-th line, including the last one.

  Args:
    workdir: the folder of the run.

  Returns:
    A dict with `step`, the list of steps, and `values`, a list of equal length
    for each name. It has None for a step at which the name was not logged.
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
