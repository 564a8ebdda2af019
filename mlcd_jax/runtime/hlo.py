"""Sizes of a compiled program, and its collectives, read from its HLO text."""

import collections
from collections.abc import Mapping
import logging
import re
import time
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

# The patterns match lines of HLO text, such as
#   %body.12 (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
#     %x = f32[8,16]{1,0} all-reduce(%y), channel_id=1, to_apply=%add.3
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_COLLECTIVE = re.compile(r' = (.*?) (' + '|'.join(KINDS) + r')(-start)?\(')
_ARRAY = re.compile(r'(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|'
  r'called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)'
)
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_CONSTANT = re.compile(r' s32\[\]\S* constant\((\d+)\)')


def collectives(text: str) -> dict[str, dict[str, float]]:
  """Counts the collectives that one device runs in one call of a program.

  A loop's body counts once for each iteration.

  Args:
    text: the HLO that `jax.stages.Compiled.as_text` returns.

  Returns:
    {kind: {"count": number of calls, "bytes": size of their results}}, without
    the kinds that do not occur.
  """
  found, calls, entry = _parse(text)
  total = {kind: {'count': 0.0, 'bytes': 0.0} for kind in KINDS}

  def visit(name, times):
    for kind, size in found[name]:
      total[kind]['count'] += times
      total[kind]['bytes'] += times * size
    for called, repeats in calls.get(name, ()):
      visit(called, times * repeats)

  visit(entry, 1)
  return {kind: values for kind, values in total.items() if values['count']}


def _parse(text: str) -> tuple[Mapping, Mapping, str]:
  """Reads the computations of a program.

  Returns:
    found: the (kind, bytes) of each collective, by computation.
    calls: the (called computation, repeats), by computation.
    entry: the name of the computation that runs first.
  """
  found, calls = collections.defaultdict(list), collections.defaultdict(list)
  limits = collections.defaultdict(lambda: 1)
  name = entry = ''
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      name = start[2]
      entry = name if start[1] else entry
      continue
    if match := _CONSTANT.search(line):
      limits[name] = max(limits[name], int(match[1]))
    if match := _COLLECTIVE.search(line):
      # An asynchronous "-start" returns a tuple of its operands and results.
      # The largest array stands for the result.
      shapes = [_bytes(*m.groups()) for m in _ARRAY.finditer(match[1])]
      found[name].append((match[2], max(shapes) if match[3] else sum(shapes)))
    trips, condition = _TRIPS.search(line), _CONDITION.search(line)
    for match in _CALLED.finditer(line):
      for called in match[1].split(','):
        repeats = int(trips[1]) if trips else condition and condition[1]
        calls[name].append((called.strip().lstrip('%'), repeats or 1))
  # XLA does not always state a loop's trip count. Without it, the largest
  # constant in the loop's condition is taken as the count.
  calls = {
    name: [(c, limits[n] if isinstance(n, str) else n) for c, n in called]
    for name, called in calls.items()
  }
  return found, calls, entry


def _bytes(kind: str, bits: str | None, dims: str) -> float:
  """Returns the size of an array from the groups of _ARRAY.

  Args:
    kind: the type, such as f32; pred is a bool and takes a whole byte.
    bits: the digits of the type, such as 32; None for pred.
    dims: the dimensions, joined with commas.
  """
  count = np.prod([int(d) for d in dims.split(',') if d], initial=1.0)
  return float(count) * (1 if kind == 'pred' else int(bits) / 8)


def compile_sizes(name: str, function, arguments) -> dict[str, Any]:
  """Compiles a program for its arguments' devices and returns its sizes.

  Args:
    name: the name of the program in log lines.
    function: a jitted function.
    arguments: its abstract arguments.

  Returns:
    Whether it fits the memory, its bytes a device, and its collectives.
  """
  _log.info('plan: compiling %s', name)
  start = time.monotonic()
  lowered = function.lower(*arguments)
  try:
    compiled = lowered.compile()
  except Exception as e:  # XLA reports a full memory as an error.
    used = re.search(r'Used ([\d.]+)([KMGT]) of', str(e))
    if 'RESOURCE_EXHAUSTED' not in str(e) or not used:
      raise
    scale = 1024 ** ('KMGT'.index(used[2]) + 1)
    return {
      'fits': False,
      'bytes_per_chip': float(used[1]) * scale,
      **dict.fromkeys(
        ('arguments', 'temporaries', 'outputs', 'program', 'bytes_moved')
      ),
      'collectives': None,
    }
  _log.info('plan: %s took %.0f s', name, time.monotonic() - start)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  # Donated arguments become outputs in place.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  sizes = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'outputs': outputs,
    'program': memory.generated_code_size_in_bytes,
  }
  return {
    'fits': True,
    'bytes_per_chip': sum(sizes.values()),
    **sizes,
    'bytes_moved': cost.get('bytes accessed'),
    'collectives': collectives(compiled.as_text()),
  }
