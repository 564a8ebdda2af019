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
from mlcd_jax.data import tfds_features
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import problems

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """A source of one TFDS split; see `sources`.

  A key is the name of the split and the index of the record in it.

  Attributes:
    data: the result of `builder.as_data_source`, with encoded images.
    split: the name of the split.
    image_key: the name of the feature with the image.
    label_key: the name of the feature with the class number. If there is no
      such feature, all labels are -1.
    caption_key: the name of the feature with the caption. If there is no such
      feature, all captions are ''.
    class_names: the names of the classes in the order of their numbers.
    label_problem: see `sources`.
    attributes_key: the path of the feature with several labels, with '/'
      between the names of nested features; '' if there is none.
    num_attributes: the number of labels of `attributes_key`.
    ignored_key: the path of a feature with the same labels and more. Those that
      only it has are neither present nor absent, such as difficult objects in
      VOC. '' if there is none.
    boxes_key: the path of the feature with the objects' boxes; '' if there is
      none.
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
  boxes_key: str = ''

  @property
  def num_classes(self) -> int:
    """Returns the number of classes; 0 if there are no labels."""
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.data[int(index)]
    objects = tfds_features.labels(record, self.attributes_key)
    attributes = np.unique(objects)
    ignored = tfds_features.labels(record, self.ignored_key)
    ignored = np.setdiff1d(ignored, attributes)
    found = {
      'key': f'{self.split}-{index:09d}',  # As in `keys`.
      'image': record[self.image_key],
      'label': int(record.get(self.label_key, -1)),
      'caption': tfds_features.caption(record.get(self.caption_key, b'')),
      'attributes': attributes,
      'ignored': ignored[ignored >= 0],
    }
    if self.boxes_key:
      boxes = tfds_features.boxes(record, self.boxes_key, found['image'])
      found['boxes'] = boxes
      if self.attributes_key:
        # A bad image has no boxes, as its size is not known.
        found['box_labels'] = objects[: len(boxes)]
    return found

  def keys(self) -> np.ndarray:
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return keys_lib.numbered(self.split, len(self))


def make_embedded(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> TfdsSource:
  """Opens a split of the embedded data, and prepares it the first time.

  Args:
    data: the `data` fields of the config; `path` names the data: digits, which
      '' means too, scenes, or scenes/NAME.
    split: the name of the split.
    found: not used.

  Raises:
    UserError: the split does not exist, or `data.data_dir` cannot be written.
    RunError: the disk is full.
  """
  del found
  from mlcd_jax.data import digits
  from mlcd_jax.data import scenes

  name, _, config = data.path.partition('/')
  with _prepared_folder(data.data_dir) as folder:
    where = dict(data_dir=folder, file_format='array_record')
    if name == 'scenes':
      builder = scenes.MlcdScenes(config=config or 'free', **where)
    else:
      builder = digits.MlcdDigits(**where)
    builder.download_and_prepare()
  return _from_builder(builder, data, split)


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> TfdsSource:
  """Opens a split of the prepared TFDS data set `data.path`.

  Args:
    data: the `data` fields of the config.
    split: the name of the split.
    found: not used.

  Raises:
    UserError: the data set, the split or a feature does not exist, or the data
      set is not prepared as ArrayRecord.
  """
  del found
  if not data.path:
    raise errors.UserError('data.path: name the TFDS data set')
  try:
    builder = tfds.builder(
      data.path,
      data_dir=paths.expand(data.data_dir, 'data.data_dir') or None,
      # TFDS's default format, TFRecord, has no random access and needs
      # TensorFlow.
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
  """Opens a split of a prepared builder, without decoding images.

  Raises:
    UserError: the split or a feature does not exist or is not of its kind.
  """
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
      f'{tfds_features.describe(features[image_key])} there; name a feature '
      'with one image'
    )
  label_problem = tfds_features.label_problem(features, data.label_key)
  attributes_key = data.get('attributes_key', '')
  ignored_key = data.get('ignored_key', '')
  boxes_key = data.get('boxes_key', '')
  num_attributes = tfds_features.num_attributes(
    builder, attributes_key, 'data.attributes_key'
  )
  tfds_features.check_boxes(builder, boxes_key, attributes_key)
  if ignored_key and num_attributes != tfds_features.num_attributes(
    builder, ignored_key, 'ignored_key'
  ):
    raise errors.UserError(
      f'ignored_key={ignored_key}: has other classes than attributes_key='
      f'{attributes_key}'
    )
  return TfdsSource(
    # The input pipeline decodes; TFDS gives the encoded bytes.
    data=_open(builder, split, {image_key: tfds.decode.SkipDecoding()}),
    split=split,
    image_key=image_key,
    label_key='' if label_problem else data.label_key,
    label_problem=label_problem,
    caption_key=data.get('caption_key', ''),
    class_names=tfds_features.class_names(features, data.label_key),
    attributes_key=attributes_key,
    num_attributes=num_attributes,
    ignored_key=ignored_key,
    boxes_key=boxes_key,
  )


def _open(builder, split: str, decoders: dict[str, Any]):
  """Returns TFDS's data source, changed to keep few files open at a time."""
  data = builder.as_data_source(split, decoders=decoders)
  # TFDS's own reader keeps every file open that it has read from.
  data.data_source = records.Records(
    [
      records.Part(records.found(os.fspath(f.filename)), f.skip, f.take)
      for f in builder.info.splits[split].file_instructions
    ]
  )
  return data


@contextlib.contextmanager
def _prepared_folder(data_dir: str) -> Iterator[str]:
  """Yields TFDS's data folder, locked so that one process at a time writes.

  Args:
    data_dir: the value of `data.data_dir`; '' stands for TFDS's default.

  Raises:
    UserError: the folder cannot be written.
    RunError: the disk is full.
  """
  tfds.disable_progress_bar()
  folder = paths.local(
    data_dir or tfds.core.constants.get_default_data_dir(), 'data.data_dir'
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.mlcd_digits.lock', 'w') as lock:
      # Without locks two processes may both prepare the data. That is safe,
      # since TFDS renames the folder only once it is complete.
      if not files.lock(lock, fcntl.LOCK_EX):
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
