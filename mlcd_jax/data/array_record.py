"""ArrayRecord files of serialized tf.train.Example messages.

What TFDS and array_record's own Beam pipelines write. Features: the image's
file as bytes under `data.image_key`, an int64 under `data.label_key` and text
as bytes under `data.caption_key`; only the image is needed. Written without
TensorFlow by:

  example = tf_example_generated_pb2.Example()
  example.features.feature['image'].bytes_list.value.append(jpeg)
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
  writer.write(example.SerializeToString())
"""

import functools
import pathlib
from typing import Any

from array_record.python import array_record_data_source
import ml_collections
import numpy as np
from tensorflow_datasets.proto import tf_example_generated_pb2

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.data import cache
from mlcd_jax.data import problems
from mlcd_jax.data import records
from mlcd_jax.data import storage


class ArrayRecordSource:
  """See `sources.Source`; a key is the file's name and the place in it."""

  class_names = ()

  def __init__(
    self,
    paths: list[str],
    keys: np.ndarray,
    *,
    image_key: str,
    label_key: str,
    caption_key: str,
  ):
    """Takes local paths and the keys of all their records."""
    self._records = records.whole(paths)
    self._keys = files.SharedArray(keys)
    self._image_key = image_key
    self._label_key = label_key
    self._caption_key = caption_key

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    features = self.features(index)
    label = list(features[self._label_key].int64_list.value)
    return {
      'key': self._keys[index].decode(),
      'image': _bytes(features[self._image_key]),
      'label': label[0] if label else -1,
      'caption': '\n'.join(
        caption.decode('utf-8', 'replace')
        for caption in features[self._caption_key].bytes_list.value
      ),
    }

  @functools.cached_property
  def num_classes(self) -> int:
    """One more than the largest label; reads every record the first time."""
    return 1 + max(
      max(self.features(i)[self._label_key].int64_list.value, default=-1)
      for i in range(len(self))
    )

  def keys(self) -> np.ndarray:
    """See `sources.Source`."""
    return self._keys.array

  def features(self, index: int):
    """Returns a record's features; none where its checksum is wrong."""
    example = tf_example_generated_pb2.Example()
    try:
      example.ParseFromString(self._records[int(index)])
    except RuntimeError:
      example.Clear()
    return example.features.feature


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> ArrayRecordSource:
  """Opens the files of `data.path`; '{split}' in it is replaced.

  Those behind URLs are copied to `data.cache_dir`: the reader needs a disk.
  """
  image_key = data.get('image_key', 'image')
  suffixes = ['.array_record', '.arrayrecord']
  paths, keys = [], []
  for file in storage.find(data.path.replace('{split}', split), suffixes):
    path = cache.local_copy(file, data.get('cache_dir', ''))
    try:
      rows = len(array_record_data_source.ArrayRecordDataSource([path]))
    except RuntimeError:
      found.add(file.path, 'unreadable shard' if file.size else 'empty shard')
      continue
    paths.append(path)
    name = pathlib.PurePath(file.path).name
    keys += [f'{name}-{row:09d}'.encode() for row in range(rows)]
  if not paths:
    raise errors.UserError(f'data.path={data.path}: no ArrayRecord in it')
  source = ArrayRecordSource(
    paths,
    np.array(keys, np.bytes_),
    image_key=image_key,
    label_key=data.label_key,
    caption_key=data.get('caption_key', 'caption'),
  )
  names = source.features(0) if len(source) else [image_key]
  if image_key not in names:
    raise errors.UserError(
      f'data.image_key={image_key}: {paths[0]} has ' + ', '.join(sorted(names))
    )
  return source


def _bytes(feature) -> bytes:
  return feature.bytes_list.value[0] if feature.bytes_list.value else b''
