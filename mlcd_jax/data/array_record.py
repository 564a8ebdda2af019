"""ArrayRecord files of serialized tf.train.Example messages.

TFDS and array_record's Beam pipelines write such files. A record has three
features: under `data.image_key` the bytes of the encoded image, under
`data.label_key` an int64 and under `data.caption_key` text as bytes. Only the
image is required. This writes such a file without TensorFlow:

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

# The number of first records among which a readable one is searched. A few may
# be damaged; if all of these are, the files hold something else.
_LOOKED_AT = 100


class ArrayRecordSource:
  """A source of ArrayRecord files; see `sources`.

  A key is the name of the file and the index of the record in it. `keys.across`
  changes it if another folder has a file of the same name.
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
    """Opens files.

    Args:
      paths: the local paths of the files.
      keys: the spelled keys of all records [N], in the order of the files.
      image_key: the name of the feature with the image.
      label_key: the name of the feature with the class number.
      caption_key: the name of the feature with the captions.
    """
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
    """Reads the labels of all records.

    Returns:
      The class numbers int64 [N], -1 where there is none, and the
      `label_problem` of `sources`. If there is a problem, all are -1.
    """
    labels = np.full(len(self), -1)
    for i in range(len(self)):
      labels[i], problem = _label(self.features(i)[self._label_key])
      # One such label means that the whole field holds something else.
      if problem:
        return files.SharedArray(np.full(len(self), -1)), problem
    return files.SharedArray(labels), ''

  @property
  def num_classes(self) -> int:
    """Returns the largest label plus one; the first call reads every record."""
    return 1 + int(self.labels().max(initial=-1))

  @property
  def label_problem(self) -> str:
    """Returns what the labels are instead of class numbers; see `sources`.

    The first call reads every record.
    """
    return self._classes[1]

  def labels(self) -> np.ndarray:
    """Returns the class numbers [N]; the first call reads every record."""
    return self._classes[0].array

  def keys(self) -> np.ndarray:
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return self._keys.array

  def features(self, index: int):
    """Returns the features of a record by name.

    The mapping is empty if the record is damaged or is not a tf.train.Example.
    A name that it lacks gives a feature without values.
    """
    example = tf_example_generated_pb2.Example()
    try:
      example.ParseFromString(self._records[int(index)])
    # A RuntimeError means a wrong checksum, a DecodeError other content.
    except (RuntimeError, message.DecodeError):
      example.Clear()
    return example.features.feature


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> ArrayRecordSource:
  """Opens the files of `data.path`; see `sources.make`.

  Files behind URLs are first copied to `data.cache_dir`, because array_record
  cannot read through fsspec.

  Args:
    data: the `data` fields of the config.
    split: the text that replaces '{split}' in `data.path`.
    found: counts the files that cannot be read.

  Raises:
    UserError: no file can be read, or the records have no image under
      `data.image_key`.
  """
  image_key = data.get('image_key', 'image')
  suffixes = ['.array_record', '.arrayrecord']
  paths, shards, keys = [], [], []
  for file in storage.find(data.path.replace('{split}', split), suffixes):
    path = cache.local_copy(file, data.get('cache_dir', ''))
    try:
      rows = len(array_record_data_source.ArrayRecordDataSource([path]))
    except RuntimeError:  # Empty, truncated or of another format.
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
  """Checks that the first readable record has an image.

  Args:
    source: the source whose records are read.
    key: the name of the feature that should hold the image.
    path: the file that an error names.

  Raises:
    UserError: no record is readable, or the feature is missing or is not
      exactly one value of bytes.
  """
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
  """Returns the number of values of a feature, of any kind."""
  kind = feature.WhichOneof('kind')
  return len(getattr(feature, kind).value) if kind else 0


def _label(feature) -> tuple[int, str]:
  """Reads the class number of a label feature.

  Returns:
    The class number, or -1 if there is none, and the `label_problem` of
    `sources`.
  """
  kind, count = feature.WhichOneof('kind'), _values(feature)
  if not count:
    return -1, ''
  if kind == 'int64_list' and count == 1:
    return feature.int64_list.value[0], ''
  if count > 1:
    return -1, 'a list'
  return -1, 'text' if kind == 'bytes_list' else 'a fraction'


def _bytes(feature) -> bytes:
  """Returns the first value of bytes; b'' if the feature has none."""
  return feature.bytes_list.value[0] if feature.bytes_list.value else b''
