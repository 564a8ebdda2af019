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
from google.protobuf import message
import ml_collections
import numpy as np
from tensorflow_datasets.proto import tf_example_generated_pb2

from mlcd_jax.data import cache
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import records
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import storage

# Records that may be damaged before a file counts as one of something else.
_LOOKED_AT = 100


class ArrayRecordSource:
  """See `sources.Source`.

  A key is the file's name and the place in it; see `keys.across`.
  """

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
    return {
      'key': self._keys[index].decode(),
      'image': _bytes(features[self._image_key]),
      'label': _label(features[self._label_key])[0],
      'caption': '\n'.join(
        caption.decode('utf-8', 'replace')
        for caption in features[self._caption_key].bytes_list.value
      ),
    }

  @functools.cached_property
  def _classes(self) -> tuple[files.SharedArray, str]:
    """All labels and why they are no classes; reads every record."""
    labels = np.full(len(self), -1)
    for i in range(len(self)):
      labels[i], problem = _label(self.features(i)[self._label_key])
      if problem:
        return files.SharedArray(np.full(len(self), -1)), problem
    return files.SharedArray(labels), ''

  @property
  def num_classes(self) -> int:
    """One more than the largest label; reads every record the first time."""
    return 1 + int(self.labels().max(initial=-1))

  @property
  def label_problem(self) -> str:
    """See `sources`; reads every record the first time."""
    return self._classes[1]

  def labels(self) -> np.ndarray:
    """See `sources`."""
    return self._classes[0].array

  def keys(self) -> np.ndarray:
    """See `sources.Source`."""
    return self._keys.array

  def features(self, index: int):
    """Returns a record's features; none where it is no tf.train.Example."""
    example = tf_example_generated_pb2.Example()
    try:
      example.ParseFromString(self._records[int(index)])
    except (RuntimeError, message.DecodeError):  # A checksum, or the content.
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
  paths, shards, keys = [], [], []
  for file in storage.find(data.path.replace('{split}', split), suffixes):
    path = cache.local_copy(file, data.get('cache_dir', ''))
    try:
      rows = len(array_record_data_source.ArrayRecordDataSource([path]))
    except RuntimeError:
      found.add(file.path, 'unreadable shard' if file.size else 'empty shard')
      continue
    paths.append(path)
    shards.append(file.path)
    keys.append(keys_lib.numbered(pathlib.PurePath(file.path).name, rows))
  if not paths:
    raise errors.UserError(f'data.path={data.path}: no ArrayRecord in it')
  source = ArrayRecordSource(
    paths,
    keys_lib.across(keys, shards),
    image_key=image_key,
    label_key=data.label_key,
    caption_key=data.get('caption_key', 'caption'),
  )
  _check_image(source, image_key, paths[0])
  return source


def _check_image(source: ArrayRecordSource, key: str, path: str) -> None:
  """Raises UserError where the first readable record has no image file."""
  if not len(source):
    return
  first = range(min(len(source), _LOOKED_AT))
  features = next(filter(None, map(source.features, first)), None)
  if features is None:
    raise errors.UserError(
      f'data.path={path}: its records are no tf.train.Example messages'
    )
  if key not in features:
    raise errors.UserError(
      f'data.image_key={key}: {path} has ' + ', '.join(sorted(features))
    )
  if len(features[key].bytes_list.value) != 1:
    kind = features[key].WhichOneof('kind') or 'nothing'
    raise errors.UserError(
      f'data.image_key={key}: {path} has {_values(features[key])} values of '
      f'{kind} there; name a feature with the bytes of one image file'
    )


def _values(feature) -> int:
  """How many values a feature has, of whatever kind."""
  kind = feature.WhichOneof('kind')
  return len(getattr(feature, kind).value) if kind else 0


def _label(feature) -> tuple[int, str]:
  """The class and '', or -1 and what is there instead if it is no class."""
  kind, count = feature.WhichOneof('kind'), _values(feature)
  if not count:
    return -1, ''
  if kind == 'int64_list' and count == 1:
    return feature.int64_list.value[0], ''
  if count > 1:
    return -1, 'a list'
  return -1, 'text' if kind == 'bytes_list' else 'a fraction'


def _bytes(feature) -> bytes:
  return feature.bytes_list.value[0] if feature.bytes_list.value else b''
