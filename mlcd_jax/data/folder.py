"""Image files below a folder, with or without a subfolder for each class."""

import glob
import os
import posixpath
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax.data import formats
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import transforms
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import storage


class FolderSource:
  """A source of image files; see `sources`.

  A key is the spelled path of the file relative to the folder. If every image
  lies in a subfolder, the subfolders of the first level are the classes,
  numbered in the order of their names. Otherwise there are no labels.
  """

  def __init__(self, root: str, paths: list[str], classes: list[str]):
    """Indexes the files.

    Args:
      root: the local folder or URL.
      paths: the paths of the images, relative to `root`.
      classes: the names of the classes in order; empty if there are no labels.
    """
    self._root = root
    number = {name: i for i, name in enumerate(classes)}
    self._keys = files.SharedArray(keys_lib.spell(paths))
    # A file is opened by the exact bytes of its name, which its spelled key may
    # not preserve. The names are concatenated, because in a fixed-width array
    # one long path would widen all rows.
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
      'image': read_image(posixpath.join(self._root, path)),
      'label': int(self._labels[index]),
      'caption': '',
    }

  def keys(self) -> np.ndarray:
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return self._keys.array


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> FolderSource:
  """Opens the folder `data.path`; see `sources.make`.

  If '{split}' stands in the path, the classes are collected from the folders of
  all splits, so that a class has the same number in each split.

  Args:
    data: the `data` fields of the config.
    split: the text that replaces '{split}' in `data.path`.
    found: counts the folders and links that cannot be read, and the files that
      are not images as left out.

  Raises:
    UserError: the folder cannot be read or has no images.
  """
  if not data.path:
    raise errors.UserError('data.path: name the folder with the images')
  path = paths.expand(data.path, 'data.path').rstrip('/')
  root = path.replace('{split}', split)
  names = storage.walk(root, found=found)
  images = [name for name in names if name.lower().endswith(formats.SUFFIXES)]
  _report_others(root, set(names).difference(images), found)
  if not images:
    raise errors.UserError(
      f'data.path={root}: no image files ({", ".join(formats.SUFFIXES)})'
    )
  classes = []
  if all('/' in image for image in images):
    classes = {image.partition('/')[0] for image in images}
    if '{split}' in path:
      # Other splits may have classes that this one lacks.
      pattern = '*'.join(map(glob.escape, path.split('{split}'))) + '/*'
      classes |= {posixpath.basename(p) for p in storage.folders(pattern)}
  return FolderSource(root, images, sorted(classes))


def read_image(path: str) -> bytes | transforms.BadImage:
  """Reads an image file.

  Returns:
    The bytes, or a BadImage with the reason if the file is missing or
    unreadable.

  Raises:
    RunError: the storage of the file fails.
  """
  try:
    return storage.read(path)
  except storage.Unreadable as e:
    return transforms.BadImage(
      transforms.MISSING if e.missing else transforms.UNREADABLE
    )


def _report_others(
  root: str, names: set[str], found: problems.Problems
) -> None:
  """Counts the files whose names are not those of images, by suffix.

  A broken link without a suffix may have led to a folder of images. So it
  counts as a missing image, and other names count as left out.

  Args:
    root: the folder.
    names: the paths of the files, relative to `root`.
    found: the counter.
  """
  for name in sorted(names):
    suffix = posixpath.splitext(name)[1].lower()
    path = posixpath.join(root, name)
    if not suffix and os.path.islink(path) and not os.path.exists(path):
      found.add(name, transforms.MISSING)
    else:
      found.leave_out(suffix or 'without suffix')
