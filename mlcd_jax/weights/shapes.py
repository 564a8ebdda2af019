"""Describes the arrays of a train state, to compare it with a checkpoint."""

import re
from typing import Any

import jax

# The paths of the class centers and of the optimizer's moments for them.
_CENTERS = re.compile(r'(^|/)classifier/weight$')


def by_path(tree: Any) -> dict[str, str]:
  """Returns the type and shape of every array, as text by path.

  The number of rows of class centers is left out, because their padding depends
  on the number of devices. The manifest of the stage records the number of
  classes.

  Args:
    tree: a nested structure of arrays, or of their shapes and types.
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
  """Returns a part of a path as text.

  The state has attributes where the metadata of a checkpoint has keys; both
  give the same text.
  """
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)
