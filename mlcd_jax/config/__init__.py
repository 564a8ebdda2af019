"""The config of a run; `default()` returns one with every field."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from mlcd_jax.config.choices import EMBEDDERS
from mlcd_jax.config.choices import LOSSES
from mlcd_jax.config.choices import METRICS
from mlcd_jax.config.choices import SOURCES
from mlcd_jax.config.choices import TASKS
from mlcd_jax.config.fields import default

__all__ = (
  'EMBEDDERS',
  'LOSSES',
  'METRICS',
  'SOURCES',
  'TASKS',
  'add_dataset',
  'default',
  'split_names',
  'tasks',
  'to_dict',
)


def add_dataset(
  config: ml_collections.ConfigDict,
  name: str,
  *,
  train_split: str = 'train',
  test_split: str = 'test',
  validation_split: str = '',
  metric: str = 'accuracy',
  attributes_key: str = '',
  ignored_key: str = '',
  boxes_key: str = '',
  prompts: str = '',
  present_classes: bool = False,
  **data: Any,
) -> None:
  """Adds a labelled data set to evaluate on.

  Args:
    config: the config to add the data set to.
    name: the name of the data set in results.json.
    train_split: the split to fit on. With '' only zero_shot and retrieval run;
      retrieval then needs no labels.
    test_split: the split to score.
    validation_split: the split to choose the linear probe's penalty on; ''
      takes a part of train_split.
    metric: the metric of the linear probe, one of METRICS.
    attributes_key: the TFDS feature with several labels per image, such as
      objects/label.
    ignored_key: a TFDS feature with the labels of attributes_key and more. An
      image is left out of the classes that only this feature names.
    boxes_key: the TFDS feature with the boxes of the objects that
      attributes_key labels, such as objects/bbox. With it multi_label scores
      the objects by their size and number.
    prompts: the prompts of zero_shot: an entry of assets/prompts.json, or
      FILE:NAME.
    present_classes: True to let zero_shot choose only among the classes of the
      test split.
    **data: fields that override those of config.data.

  Raises:
    ValueError: `data` has an unknown field.
  """
  dataset = ml_collections.ConfigDict(
    dict(
      train_split=train_split,
      test_split=test_split,
      validation_split=validation_split,
      metric=metric,
      attributes_key=attributes_key,
      ignored_key=ignored_key,
      boxes_key=boxes_key,
      prompts=prompts,
      present_classes=present_classes,
    )
  )
  for field in (
    'source',
    'path',
    'data_dir',
    'image_key',
    'label_key',
    'caption_key',
    'cache_dir',
  ):
    dataset[field] = data.pop(field, config.data[field])
  if data:
    raise ValueError(f'unknown data fields: {sorted(data)}')
  config.evaluate.datasets[name] = dataset


def tasks(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the tasks to evaluate, in the order of TASKS."""
  wanted = split_names(config.evaluate.tasks)
  return tuple(t for t in TASKS if t in wanted or 'all' in wanted)


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as plain JSON types; tuples become lists."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(v) for v in value]
    return value

  return plain(config.to_dict())


def split_names(names: Sequence[str]) -> list[str]:
  """Returns the names one by one; the command line gives 'a,b' as one name."""
  found = [n.strip() for part in names for n in str(part).split(',')]
  return [name for name in found if name]
