"""Who may import whom: data goes one way, and the floors have an order."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / 'mlcd_jax'

_GROUND = {'runtime', 'losses', 'unit', 'sharding'}
# What a stage lends to others: readers of its files, and interfaces.
_READERS = {
  'embed.shards',
  'embed.row_files',
  'embed.embedders',
  'cluster.labels',
  'evaluate.table',
}
# Rooms that each room may import; commands and `stages` import all.
_ALLOWED = {
  'runtime': set(),
  'losses': set(),
  'unit': set(),
  'sharding': {'runtime'},
  'manifests': {'runtime'},
  'optimizer': {'runtime'},
  'models': {'runtime'},
  'data': {'runtime'},
  'kmeans': {'unit', 'sharding'},
  'config': {'runtime', 'sharding'},
  'weights': {'runtime', 'config', 'models', 'data'},
  'embed': _GROUND | {'manifests', 'data', 'weights', 'config'},
  'cluster': _GROUND | {'manifests', 'data', 'config', 'kmeans'},
  'train': _GROUND
  | {'manifests', 'optimizer', 'data', 'config', 'models', 'weights'},
  'evaluate': _GROUND
  | {'manifests', 'optimizer', 'data', 'config', 'models', 'weights', 'kmeans'},
  'page': _GROUND | {'manifests', 'data', 'config', 'evaluate'},
}
_COMMANDS = {'main', 'plan', 'convert', 'report', 'check_data'}


def arrows():
  """Yields (importing module, imported module), without the package's name."""
  for path in ROOT.rglob('*.py'):
    here = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
      if isinstance(node, ast.ImportFrom) and node.module:
        package, *parts = node.module.split('.')
        if package == 'mlcd_jax':
          for name in node.names:
            yield here, '.'.join([*parts, name.name])


def room(module):
  return module.partition('.')[0]


def test_rooms_import_only_what_lies_below_them():
  wrong = [
    f'{here} imports {there}'
    for here, there in arrows()
    if room(here) in _ALLOWED
    and room(there) != room(here)
    and room(there) not in _ALLOWED[room(here)]
    and there not in _READERS
  ]
  assert not wrong


def test_no_room_is_left_out():
  rooms = {room(here) for here, _ in arrows()}
  assert rooms <= set(_ALLOWED) | _COMMANDS | {'stages'}


def test_only_stages_imports_a_stage():
  found = {here for here, there in arrows() if there.endswith('.stage')}
  assert found == {'stages'}


def test_kmeans_has_one_face():
  wrong = [
    f'{here} imports {there}'
    for here, there in arrows()
    if there.startswith('kmeans.') and room(here) != 'kmeans'
  ]
  assert not wrong


def test_no_circles():
  graph = collections.defaultdict(set)
  for here, there in arrows():
    if room(here) != room(there) and there not in _READERS:
      graph[room(here)].add(room(there))
  while leaves := [r for r in graph if not any(t in graph for t in graph[r])]:
    for leaf in leaves:
      del graph[leaf]
  assert not graph


def test_the_top_and_the_files_stay_small():
  top = [p for p in ROOT.iterdir() if p.name != '__pycache__']
  assert len(top) <= 24
  long = [
    f'{path} has {lines} lines'
    for path in ROOT.rglob('*.py')
    if (lines := len(path.read_text('utf-8').splitlines())) > 400
  ]
  assert not long
