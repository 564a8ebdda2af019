"""Image files below a folder, with or without a folder for each class."""

import posixpath
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import problems
from mlcd_jax.data import storage

_IMAGES = (
  '.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif',
)  # fmt: skip


class FolderSource:
  """See `sources.Source`; a key is the path below the folder, as spelled.

  Where every image lies in a sub-folder, the first ones are the classes,
  numbered in the order of their names; otherwise there are no labels.
  """

  def __init__(self, root: str, paths: list[str], classes: list[str]):
    """Takes the paths below `root`, and the names of the classes, if any."""
    self._root = root
    number = {name: i for i, name in enumerate(classes)}
    self._keys = files.SharedArray(keys_lib.spell(paths))
    # Files are read by the bytes that the system has, in a row since one long
    # path must not widen all.
    paths_as_bytes = [p.encode('utf-8', 'surrogateescape') for p in paths]
    self._paths = files.SharedArray(
      np.frombuffer(b''.join(paths_as_bytes), np.uint8)
    )
    self._ends = files.SharedArray(np.cumsum([0, *map(len, paths_as_bytes)]))
    self._labels = files.SharedArray(
      np.array([number.get(p.partition('/')[0], -1) for p in paths], np.int32)
    )
    self.num_classes = len(classes)
    self.class_names = [keys_lib.text(k) for k in keys_lib.spell(classes)]

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self._paths[self._ends[index] : self._ends[index + 1]].tobytes()
    path = path.decode('utf-8', 'surrogateescape')
    return {
      'key': self._keys[index].decode(),
      'image': storage.read(posixpath.join(self._root, path)),
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
  paths = [
    path
    for path in storage.walk(root)
    if path.lower().endswith(_IMAGES)
    and not posixpath.basename(path).startswith('.')
  ]
  if not paths:
    raise errors.UserError(
      f'data.path={root}: no image files ({", ".join(_IMAGES)})'
    )
  classes = []
  if all('/' in path for path in paths):
    classes = {path.partition('/')[0] for path in paths}
    if '{split}' in data.path:
      pattern = posixpath.join(data.path.replace('{split}', '*'), '*')
      classes |= {posixpath.basename(p) for p in storage.folders(pattern)}
  return FolderSource(root, paths, sorted(classes))
