"""COCO in its published files: a folder of images and a JSON for each split.

`data.path` is the folder with annotations/instances_SPLIT.json and SPLIT/, and
`data.split` is train2014, val2014, train2017 or val2017. The labels of an image
are the categories of its annotations, including crowds (`iscrowd`). Images
without annotations are left out. Both rules are those of coco.py in ML-GCN
(Chen et al. 2019), for the 2014 splits of the multi-label benchmark.
"""

from collections.abc import Sequence
import dataclasses
import json
import posixpath
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax.data import folder as folder_lib
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import storage

_URL = 'http://images.cocodataset.org'
# The splits with published annotations; those of the test splits are secret.
_PUBLISHED = ('train2014', 'val2014', 'train2017', 'val2017')


@dataclasses.dataclass(frozen=True)
class Annotations:
  """The content of a file of instances, with N images and A annotations.

  The annotations are sorted by image.

  Attributes:
    names: the file names of the images, [N].
    categories: the names of the categories in the order of their ids. COCO has
      80.
    starts: int64 [N + 1]; the annotations of image i have the indices from
      starts[i] up to, not including, starts[i + 1].
    category: int32 [A], the index in `categories` of each annotation.
  """

  names: Sequence[str]
  categories: Sequence[str]
  starts: np.ndarray
  category: np.ndarray


class CocoSource:
  """A multi-label source of COCO; see `sources`.

  A key is the file name of the image. The attributes are the categories.
  """

  num_classes = 0  # An image has several categories, so no single class.
  class_names = ()

  def __init__(self, folder: str, found: Annotations, images: np.ndarray):
    """Selects images.

    Args:
      folder: the folder of the images.
      found: the annotations of all images.
      images: int64 [n], the indices in `found.names` of the images to take.
    """
    self._folder = folder
    self._names = found.names
    self._keys = files.SharedArray(
      keys_lib.spell([found.names[i] for i in images])
    )
    self._images = files.SharedArray(images)
    self._starts = files.SharedArray(found.starts)
    self._category = files.SharedArray(found.category)
    self.num_attributes = len(found.categories)

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image = self._images[index]
    first, last = self._starts[image], self._starts[image + 1]
    return {
      'key': self._keys[index].decode(),
      'image': folder_lib.read_image(
        posixpath.join(self._folder, self._names[image])
      ),
      'label': -1,
      'caption': '',
      'attributes': np.unique(self._category[first:last]),
    }

  def keys(self) -> np.ndarray:
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return self._keys.array


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> CocoSource:
  """Opens a split of the folder `data.path`; see `sources.make`.

  Args:
    data: the `data` fields of the config.
    split: the name of the split.
    found: counts the missing image files, and the images without annotations as
      left out.

  Raises:
    UserError: the folder of the images or the annotations cannot be read.
  """
  root = paths.expand(data.path, 'data.path')
  folder = posixpath.join(root, split)
  path = posixpath.join(root, 'annotations', f'instances_{split}.json')
  try:
    annotations = read(path)
    there = set(storage.walk(folder))
  except errors.UserError as e:
    raise errors.UserError(f'{e}; {_way_out(data.path, split)}') from e
  annotated = np.flatnonzero(np.diff(annotations.starts))
  found.leave_out('no annotation', len(annotations.names) - len(annotated))
  taken = []
  for image in annotated:
    if annotations.names[image] in there:
      taken.append(image)
    else:
      found.add(annotations.names[image], 'no file')
  return CocoSource(folder, annotations, np.array(taken, np.int64))


def read(path: str) -> Annotations:
  """Reads a file of instances.

  Annotations of images that the file does not list are ignored.

  Raises:
    UserError: the file cannot be read, or its content has another form.
  """
  with storage.reading(path), storage.open_file(path) as f:
    # The outlines are most of the file and not used here. Dropping each one as
    # soon as it is parsed saves their memory.
    content = json.load(f, object_hook=_without_outline)
  try:
    # COCO's 80 category ids have gaps, so the categories are numbered anew.
    listed = sorted(content['categories'], key=lambda c: c['id'])
    names = [image['file_name'] for image in content['images']]
    image_of = {image['id']: i for i, image in enumerate(content['images'])}
    category_of = {c['id']: i for i, c in enumerate(listed)}
    pairs = [
      (image_of[a['image_id']], category_of[a['category_id']])
      for a in content['annotations']
      if a['image_id'] in image_of
    ]
    categories = [c['name'] for c in listed]
  except (KeyError, TypeError) as e:
    raise errors.UserError(
      f'data.path={path}: no instances as COCO has them ({e!r})'
    ) from e
  image, category = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
  starts = np.searchsorted(image, np.arange(len(names) + 1))
  return Annotations(names, categories, starts, category.astype(np.int32))


def _without_outline(found: dict[str, Any]) -> dict[str, Any]:
  """Removes the outline from an object of the JSON, and returns the object."""
  found.pop('segmentation', None)
  return found


def _way_out(root: str, split: str) -> str:
  """Returns the end of an error that says where to download a split."""
  if split not in _PUBLISHED:
    return 'COCO has the splits ' + ', '.join(_PUBLISHED)
  return (
    f'unpack {_URL}/annotations/annotations_trainval{split[-4:]}.zip and '
    f'{_URL}/zips/{split}.zip in {root or "the folder data.path"}'
  )
