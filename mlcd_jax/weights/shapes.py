"""Names and shapes of all arrays of a tree, to compare checkpoints by."""

import re
from typing import Any

import jax

# Class centers and their moments.
_CENTERS = re.compile(r'(^|/)classifier/weight$')


def by_path(tree: Any) -> dict[str, str]:
  """Returns path -> type and shape of every array.

  Class centers lie in as many rows as the devices share evenly; how many
  classes there are, the stage's manifest says.
  """
  paths = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: hasattr(x, 'shape')
  )
  shapes = {}
  for path, x in paths:
    if hasattr(x, 'shape'):
      name, shape = '/'.join(_name(key) for key in path), list(x.shape)
      if _CENTERS.search(name):
        shape[0] = 'rows'
      shapes[name] = f'{x.dtype}{shape}'
  return shapes


def _name(key: Any) -> str:
  """One part of a path, the same for attributes, keys and places."""
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)
