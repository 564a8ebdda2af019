"""COCO as it is published: one JSON of annotations a split, beside its images.

`data.path` is the folder with annotations/instances_SPLIT.json and SPLIT/, so
`data.split` is train2014, val2014, train2017 and so on. An image has the
categories of its annotations as labels, crowds (`iscrowd`) as well, and one
without an annotation is left out: both as ML-GCN's coco.py (Chen et al. 2019)
makes the 2014 split of the multi-label benchmark.
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
_PUBLISHED = ('train2014', 'val2014', 'train2017', 'val2017')


@dataclasses.dataclass(frozen=True)
class Annotations:
  """What a file of instances says; N images, A annotations.

  Attributes:
    names: of the images' files, [N].
    categories: names, in the order of their ids; 80 in COCO.
    starts: int64 [N + 1], the annotations of image i are those from starts[i]
      to starts[i + 1].
    category: int32 [A], place in `categories`.
  """

  names: Sequence[str]
  categories: Sequence[str]
  starts: np.ndarray
  category: np.ndarray


class CocoSource:
  """See `sources.Source`; a key is the image file's name."""

  num_classes = 0
  class_names = ()

  def __init__(self, folder: str, found: Annotations, images: np.ndarray):
    """Takes the images' folder, and which images are taken."""
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
    """See `sources.Source`."""
    return self._keys.array


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> CocoSource:
  """Opens a split of the folder `data.path`."""
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

  Raises:
    UserError: it is not there, or holds something else.
  """
  with storage.reading(path), storage.open_file(path) as f:
    # Outlines are most of the file, and of no use here.
    content = json.load(f, object_hook=_without_outline)
  try:
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
  found.pop('segmentation', None)
  return found


def _way_out(root: str, split: str) -> str:
  """Where a split is to be had."""
  if split not in _PUBLISHED:
    return 'COCO has the splits ' + ', '.join(_PUBLISHED)
  return (
    f'unpack {_URL}/annotations/annotations_trainval{split[-4:]}.zip and '
    f'{_URL}/zips/{split}.zip in {root or "the folder data.path"}'
  )
