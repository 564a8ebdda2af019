"""The features of a TFDS data set: what they are, and their values in a record.

A path names a feature, with '/' between the names of nested features, such as
objects/label.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mlcd_jax.data import transforms
from mlcd_jax.runtime import errors


def class_names(features, label_key: str) -> Sequence[str]:
  """Returns the names of the classes; numbers as text if they have no names.

  It is empty if the feature is missing or not a ClassLabel.
  """
  feature = features[label_key] if label_key in features else None
  is_class = isinstance(feature, tfds.features.ClassLabel)
  if not is_class or not feature.num_classes:
    return ()
  return feature.names or [str(i) for i in range(feature.num_classes)]


def label_problem(features, label_key: str) -> str:
  """Describes a label feature that holds no class numbers; see `sources`.

  Returns:
    The description, or '' if the feature is missing or holds class numbers.
  """
  feature = features[label_key] if label_key in features else None
  if feature is None or isinstance(feature, tfds.features.ClassLabel):
    return ''
  if getattr(feature, 'shape', None) == () and np.issubdtype(
    feature.np_dtype, np.integer
  ):
    return ''
  return describe(feature)


def describe(feature) -> str:
  """Returns the kind of a feature for an error message."""
  if isinstance(feature, tfds.features.Text):
    return 'text'
  if isinstance(feature, (tfds.features.Sequence, tfds.features.Dataset)):
    return 'a list'
  if isinstance(feature, tfds.features.FeaturesDict):
    return 'a group of features'
  return f'of type {type(feature).__name__}'


def caption(found: Any) -> str:
  """Returns a caption feature as text, with one line for each caption.

  Args:
    found: bytes, a list, or a dict with captions under 'text', which is the
      form of COCO's captions. Other values give ''.
  """
  if isinstance(found, dict):
    found = found.get('text', b'')
  if isinstance(found, bytes):
    return found.decode('utf-8', 'replace')
  if not isinstance(found, (list, tuple, np.ndarray)):
    return ''
  return '\n'.join(filter(None, map(caption, found)))


def _at(record: dict[str, Any], key: str) -> Any:
  """Returns the feature at a path with '/' between names."""
  for part in key.split('/'):
    record = record[part]
  return record


def labels(record: dict[str, Any], key: str) -> np.ndarray:
  """Returns the label numbers at a path in their order; '' gives none."""
  return np.asarray(_at(record, key) if key else [], np.int64).reshape(-1)


def boxes(
  record: dict[str, Any], key: str, image: bytes | transforms.BadImage
) -> np.ndarray:
  """Returns the boxes at a path in pixels; see `sources`."""
  try:
    width, height = transforms.read_size(image)
  except transforms.BadImage:
    return np.zeros((0, 4), np.float32)
  found = np.asarray(_at(record, key), np.float32).reshape(-1, 4)
  # TFDS has top, left, bottom and right as shares of the sides.
  sides = np.array([width, height, width, height], np.float32)
  return found[:, [1, 0, 3, 2]] * sides[None]


def _names(features) -> list[str]:
  """Returns the names of the features of a group; none of a single one."""
  return list(features) if hasattr(features, 'keys') else []


def _feature(builder, key: str, field: str):
  """Returns the feature of one element at a path.

  Args:
    builder: the builder of the data set.
    key: the path of the feature, with '/' between names.
    field: the config field that an error names.

  Raises:
    UserError: there is no such feature.
  """
  features = builder.info.features
  for part in key.split('/'):
    # A Sequence has the features of its elements in `feature`.
    features = getattr(features, 'feature', features)
    try:
      features = features[part]
    except (KeyError, TypeError) as e:
      raise errors.UserError(
        f'{field}={key}: {builder.name} has no {part} there; it has '
        + ', '.join(sorted(_names(features)))
      ) from e
  return getattr(features, 'feature', features)


def num_attributes(builder, key: str, field: str) -> int:
  """Returns the number of labels of a feature with several an image.

  Args:
    builder: the builder of the data set.
    key: the path of the feature; '' gives 0.
    field: the config field that an error names.

  Raises:
    UserError: there is no such feature, or it has no classes.
  """
  if not key:
    return 0
  feature = _feature(builder, key, field)
  count = getattr(feature, 'num_classes', None)
  if not count:
    raise errors.UserError(
      f'{field}={key}: {builder.name} has {describe(feature)} there; name a '
      'feature with several classes, such as objects/label'
    )
  return count


def check_boxes(builder, key: str, attributes_key: str) -> None:
  """Raises UserError unless the feature has the boxes of the labelled objects.

  Args:
    builder: the builder of the data set.
    key: the path of the boxes; '' passes.
    attributes_key: the path of the labels, or ''.
  """
  if not key:
    return
  feature = _feature(builder, key, 'data.boxes_key')
  if not isinstance(feature, tfds.features.BBoxFeature):
    raise errors.UserError(
      f'data.boxes_key={key}: {builder.name} has {describe(feature)} there; '
      'name a feature with boxes, such as objects/bbox'
    )
  # Builders of older versions of TFDS do not tell the format.
  kind = getattr(feature.bbox_format, 'value', feature.bbox_format)
  if kind not in (None, 'REL_YXYX'):
    raise errors.UserError(
      f'data.boxes_key={key}: {builder.name} has boxes as {kind}; only '
      'REL_YXYX, the default of TFDS, is read'
    )
  # Boxes and labels of one Sequence have the same length and order.
  group, _, _ = key.rpartition('/')
  if attributes_key and group != attributes_key.rpartition('/')[0]:
    raise errors.UserError(
      f'data.boxes_key={key}: its boxes are not those of the labels of '
      f'data.attributes_key={attributes_key}; name the labels in {group}/ there'
    )
