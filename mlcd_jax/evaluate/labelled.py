"""Selection of the images that have the labels a task needs.

This is the only place that leaves out images without a label, so that no task
has to check for them. An image without a class may still have attributes.
"""

from collections.abc import Mapping
import dataclasses
import functools
import logging

import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax.data import sources
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate.tasks import zero_shot
from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# The tasks that fit nothing on a data set, so that it needs no train split.
UNFITTED = ('zero_shot', 'retrieval')


def num_classes(splits: Mapping[str, sources.Source]) -> int:
  """Returns the number of classes of a data set.

  It is the maximum over the splits, since a split may have no image of the
  last class.
  """
  return max(source.num_classes for source in splits.values())


def keep(task: str, data: features.Data, name: str) -> features.Data:
  """Returns the data without the images that lack the labels a task needs.

  Args:
    task: the name of the task, one of config.TASKS.
    data: the data with all images.
    name: the name of the data set.

  Raises:
    UserError: a split has no image left.
  """
  needed = _needed(task, data.config, data.num_classes)
  kept = {}
  for split in ('train', 'validation', 'test'):
    whole = getattr(data, split)
    if whole is None or not needed:
      continue
    kept[split] = whole.labelled(several=needed == 'attributes')
    missing = len(whole) - len(kept[split])
    if missing:
      _tell(name, split, needed, missing, len(whole))
    if not len(kept[split]):
      raise _nothing_left(name, split, needed, data.config)
  return dataclasses.replace(data, **kept)


def check(
  name: str,
  config: ml_collections.ConfigDict,
  splits: Mapping[str, sources.Source],
) -> None:
  """Raises UserError if a data set lacks the labels that the tasks need.

  Args:
    name: the name of the data set.
    config: the config of the run.
    splits: the sources by split; train and validation may be absent.
  """
  field = f'evaluate.datasets.{name}'
  dataset, tasks = config.evaluate.datasets[name], config_lib.tasks(config)
  train = splits.get('train')
  attributes = getattr(train, 'num_attributes', 0)
  if train and not train.num_classes and (dataset.label_key or not attributes):
    raise errors.UserError(
      f'{field}.label_key={dataset.label_key}: no class labels there; name '
      f'the feature that has them, or set {field}.train_split= for '
      + ' and '.join(UNFITTED)
    )
  total = num_classes(splits)
  if any(_needed(task, dataset, total) == 'class' for task in tasks):
    for split, source in splits.items():
      # This reads few records: usually the first one has a label.
      if not any(source[i]['label'] >= 0 for i in range(len(source))):
        raise _nothing_left(name, split, 'class', dataset)
  if 'zero_shot' in tasks:
    zero_shot.check(dataset, splits['test'], total, field)


def _needed(task: str, dataset: ml_collections.ConfigDict, total: int) -> str:
  """Returns the kind of label that a task needs.

  Args:
    task: the name of the task.
    dataset: the fields of the data set in the config.
    total: the number of classes of the data set.

  Returns:
    'class', 'attributes', or '' if it needs neither.
  """
  # VOC2007's metric is the mean over attributes, so its probe fits those.
  eleven = dataset.get('metric', 'accuracy') == 'map_11_point'
  if task == 'multi_label' or (task == 'linear' and eleven):
    return 'attributes'
  return 'class' if total else ''


# Cached, so that it warns once and not for each encoder, task and evaluation.
@functools.cache
def _tell(name: str, split: str, needed: str, missing: int, total: int) -> None:
  """Warns about the images of a split that are left out."""
  _log.warning(
    'evaluate: %s %s: %d of %d images have no %s and are left out',
    name, split, missing, total, needed,
  )  # fmt: skip


def _nothing_left(
  name: str, split: str, needed: str, dataset: ml_collections.ConfigDict
) -> errors.UserError:
  """Returns the error for a split in which no image has the needed label."""
  field = f'evaluate.datasets.{name}'
  key = 'label_key' if needed == 'class' else 'attributes_key'
  return errors.UserError(
    f'{field}.{split}_split={dataset[f"{split}_split"]}: no image there has a '
    f'label under {field}.{key}={dataset[key]}; name a split that has them'
  )
