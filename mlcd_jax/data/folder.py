"""Image files below a folder, with or without a folder for each class."""

import posixpath
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.data import problems
from mlcd_jax.data import storage

_IMAGES = (
  '.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif',
)  # fmt: skip


class FolderSource:
  """See `sources.Source`; a key is the path below the folder.

  Where every image lies in a sub-folder, the first ones are the classes,
  numbered in the order of their names; otherwise there are no labels.
  """

  def __init__(self, root: str, keys: list[str], classes: list[str]):
    """Takes the paths below `root`, and the names of the classes, if any."""
    self._root = root
    number = {name: i for i, name in enumerate(classes)}
    self._keys = files.SharedArray(
      np.array([key.encode('utf-8', 'surrogateescape') for key in keys])
    )
    self._labels = files.SharedArray(
      np.array([number.get(k.partition('/')[0], -1) for k in keys], np.int32)
    )
    self.num_classes = len(classes)
    self.class_names = classes

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    key = self._keys[index].decode('utf-8', 'surrogateescape')
    return {
      'key': key.encode('utf-8', 'replace').decode(),
      'image': storage.read(posixpath.join(self._root, key)),
      'label': int(self._labels[index]),
      'caption': '',
    }

  def keys(self) -> np.ndarray:
    """See `sources.Source`."""
    return self._keys.array


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> FolderSource:
  """Opens the folder `data.path`; '{split}' in it is replaced.

  The classes are those of all splits, so that their numbers agree.
  """
  del found  # Files that are no images show when they are read.
  if not data.path:
    raise errors.UserError('data.path: name the folder with the images')
  root = data.path.replace('{split}', split).rstrip('/')
  keys = [
    key
    for key in storage.walk(root)
    if key.lower().endswith(_IMAGES)
    and not posixpath.basename(key).startswith('.')
  ]
  if not keys:
    raise errors.UserError(
      f'data.path={root}: no image files ({", ".join(_IMAGES)})'
    )
  classes = []
  if all('/' in key for key in keys):
    classes = {key.partition('/')[0] for key in keys}
    if '{split}' in data.path:
      pattern = posixpath.join(data.path.replace('{split}', '*'), '*')
      classes |= {posixpath.basename(p) for p in storage.folders(pattern)}
  return FolderSource(root, keys, sorted(classes))
