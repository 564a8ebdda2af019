"""TFDS data sets prepared as ArrayRecord, read without TensorFlow."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import logging
import os
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import records
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """See `sources.Source`; a key is the split and the place in it.

  Attributes:
    data: what `builder.as_data_source` returns, images undecoded.
    split: name of the split, part of every key.
    image_key: feature with the image.
    label_key: feature with the class; a name of none where there is none.
    caption_key: feature with the caption, ignored likewise.
    class_names: of `label_key`, in the order of their numbers.
    label_problem: see `sources`.
    attributes_key: feature with several labels, '/' between its parts; ''
      where there is none.
    num_attributes: number of classes of `attributes_key`.
    ignored_key: feature with those labels and others that are neither there
      nor not, such as VOC's difficult objects; '' where there is none.
  """

  data: Any
  split: str
  image_key: str
  label_key: str
  caption_key: str
  class_names: Sequence[str]
  label_problem: str = ''
  attributes_key: str = ''
  num_attributes: int = 0
  ignored_key: str = ''

  @property
  def num_classes(self) -> int:
    """0 where there are no labels."""
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.data[int(index)]
    attributes = _labels(record, self.attributes_key)
    ignored = np.setdiff1d(_labels(record, self.ignored_key), attributes)
    return {
      'key': f'{self.split}-{index:09d}',
      'image': record[self.image_key],
      'label': int(record.get(self.label_key, -1)),
      'caption': _caption(record.get(self.caption_key, b'')),
      'attributes': attributes,
      'ignored': ignored[ignored >= 0],
    }

  def keys(self) -> np.ndarray:
    """See `sources.Source`."""
    return keys_lib.numbered(self.split, len(self))


def make_embedded(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> TfdsSource:
  """Opens the digits, preparing them the first time."""
  del found
  from mlcd_jax.data import digits

  with _prepared_folder(data.data_dir) as folder:
    builder = digits.MlcdDigits(data_dir=folder, file_format='array_record')
    builder.download_and_prepare()
  return _from_builder(builder, data, split)


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> TfdsSource:
  """Opens the prepared data set named `data.path`."""
  del found
  if not data.path:
    raise errors.UserError('data.path: name the TFDS data set')
  try:
    builder = tfds.builder(
      data.path,
      data_dir=paths.expand(data.data_dir, 'data.data_dir') or None,
      file_format='array_record',
    )
  except (tfds.core.DatasetNotFoundError, ValueError) as e:
    reason = str(e).strip().splitlines()[0]
    raise errors.UserError(
      f'data.path={data.path}: not a TFDS data set ({reason})'
    ) from e
  if not builder.is_prepared():
    raise errors.UserError(
      f'data.path={data.path} is not prepared as ArrayRecord in '
      f'{builder.data_path.parent.parent}; prepare it with: tfds build '
      f'{data.path} --file_format=array_record'
    )
  return _from_builder(builder, data, split)


def _from_builder(builder, data: ml_collections.ConfigDict, split: str):
  """Opens one split of a prepared builder, images left encoded."""
  try:
    num_images = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as e:
    raise errors.UserError(
      f'data.split={split}: {builder.name} has '
      + ', '.join(sorted(builder.info.splits))
    ) from e
  if not num_images:
    raise errors.UserError(
      f'data.split={split} of {builder.name} has no images'
    )
  features = builder.info.features
  image_key = data.get('image_key', 'image')
  if image_key not in features:
    raise errors.UserError(
      f'data.image_key={image_key}: {builder.name} has '
      + ', '.join(sorted(features))
    )
  if not isinstance(features[image_key], tfds.features.Image):
    raise errors.UserError(
      f'data.image_key={image_key}: {builder.name} has '
      f'{_describe(features[image_key])} there; name a feature with one image'
    )
  label_problem = _label_problem(features, data.label_key)
  attributes_key = data.get('attributes_key', '')
  ignored_key = data.get('ignored_key', '')
  num_attributes = _num_attributes(builder, attributes_key, 'attributes_key')
  if ignored_key and num_attributes != _num_attributes(
    builder, ignored_key, 'ignored_key'
  ):
    raise errors.UserError(
      f'ignored_key={ignored_key}: has other classes than attributes_key='
      f'{attributes_key}'
    )
  return TfdsSource(
    data=_open(builder, split, {image_key: tfds.decode.SkipDecoding()}),
    split=split,
    image_key=image_key,
    label_key='' if label_problem else data.label_key,
    label_problem=label_problem,
    caption_key=data.get('caption_key', ''),
    class_names=_class_names(features, data.label_key),
    attributes_key=attributes_key,
    num_attributes=num_attributes,
    ignored_key=ignored_key,
  )


def _open(builder, split: str, decoders: dict[str, Any]):
  """TFDS's data source, with few of its files open at a time."""
  data = builder.as_data_source(split, decoders=decoders)
  data.data_source = records.Records(
    [
      records.Part(records.found(os.fspath(f.filename)), f.skip, f.take)
      for f in builder.info.splits[split].file_instructions
    ]
  )
  return data


def _class_names(features, label_key: str) -> Sequence[str]:
  """Empty where the feature is missing or no class label."""
  feature = features[label_key] if label_key in features else None
  is_class = isinstance(feature, tfds.features.ClassLabel)
  if not is_class or not feature.num_classes:
    return ()
  return feature.names or [str(i) for i in range(feature.num_classes)]


def _label_problem(features, label_key: str) -> str:
  """What the feature is if it is no class; '' where it is, or is missing."""
  feature = features[label_key] if label_key in features else None
  if feature is None or isinstance(feature, tfds.features.ClassLabel):
    return ''
  if getattr(feature, 'shape', None) == () and np.issubdtype(
    feature.np_dtype, np.integer
  ):
    return ''
  return _describe(feature)


def _describe(feature) -> str:
  """What a feature is, for people."""
  if isinstance(feature, tfds.features.Text):
    return 'text'
  if isinstance(feature, (tfds.features.Sequence, tfds.features.Dataset)):
    return 'a list'
  if isinstance(feature, tfds.features.FeaturesDict):
    return 'a group of features'
  return f'of type {type(feature).__name__}'


def _caption(found: Any) -> str:
  """A text, several as lines, or those in a feature such as COCO's."""
  if isinstance(found, dict):
    found = found.get('text', b'')
  if isinstance(found, bytes):
    return found.decode('utf-8', 'replace')
  if not isinstance(found, (list, tuple, np.ndarray)):
    return ''  # A number, say.
  return '\n'.join(filter(None, map(_caption, found)))


def _labels(record: dict[str, Any], key: str) -> np.ndarray:
  """The numbers under a key, each once, in order; none without a key."""
  found = record if key else []
  for part in filter(None, key.split('/')):
    found = found[part]
  return np.unique(np.asarray(found, np.int64))


def _num_attributes(builder, key: str, field: str) -> int:
  """Classes of a sequence of labels; 0 without a key."""
  if not key:
    return 0
  features = builder.info.features
  for part in key.split('/'):
    features = getattr(features, 'feature', features)  # Of a sequence.
    try:
      features = features[part]
    except (KeyError, TypeError) as e:
      raise errors.UserError(
        f'{field}={key}: {builder.name} has '
        + ', '.join(sorted(builder.info.features))
      ) from e
  features = getattr(features, 'feature', features)
  return getattr(features, 'num_classes', None) or 0


@contextlib.contextmanager
def _prepared_folder(data_dir: str) -> Iterator[str]:
  """Yields TFDS's data folder, held so that one process at a time writes."""
  tfds.disable_progress_bar()
  folder = paths.local(
    data_dir or tfds.core.constants.get_default_data_dir(), 'data.data_dir'
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.mlcd_digits.lock', 'w') as lock:
      if not files.lock(lock, fcntl.LOCK_EX):  # TFDS renames what is whole.
        _log.warning('data: the file system of %s has no locks', folder)
      yield str(folder)
  except (OSError, RuntimeError) as e:
    reason = getattr(e, 'strerror', None) or str(e)
    full = getattr(e, 'errno', 0) in errors.DISK_FULL or 'No space' in reason
    if isinstance(e, RuntimeError) and not full:
      raise
    kind = errors.RunError if full else errors.UserError
    raise kind(
      f'data.data_dir={folder}: cannot be written ({reason}); name a folder '
      'that can, here or in TFDS_DATA_DIR'
    ) from e
