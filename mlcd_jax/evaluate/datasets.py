"""The data sets of MLCD's linear probe, by name (Tables 1, 11 and 12).

`--config.evaluate.named=food101,pets` adds these two to evaluate.datasets, and
`--config.evaluate.named=paper` adds all of NAMED. A data set that TFDS has is
read from evaluate.data_dir, or from TFDS's own folder if that is ''. Any other
is read from evaluate.data_dir/NAME, which has a folder for each split and in it
a folder for each class. COCO is read in its published layout.

The sizes of resisc45, eurosat, clevr, kitti, gtsrb and country211 come from
MLCD's Table 11. The other sizes are meant to be those of Radford et al. (2021),
Table 9, but neither they nor the splits were checked against it. A data set of
another size is scored all the same, with a warning.
"""

import dataclasses
import logging
import os

import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax.evaluate import prompts
from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Named:
  """One data set of the paper.

  Attributes:
    train: the published number of images in train and validation together.
    test: the published number of images in test.
    metric: the metric of the linear probe, one of config.METRICS.
    tfds: the name in TFDS; '' if TFDS does not have the data set.
    source: how a data set that is not in TFDS is read, one of config.SOURCES.
    url: the place to download it from by hand; '' if there is none.
    splits: the names of the splits for train, validation and test. An empty
      validation takes a part of train.
    keys: fields of the data set in the config that differ from the defaults,
      such as label_key.
  """

  train: int
  test: int
  metric: str = 'accuracy'
  tfds: str = ''
  source: str = 'folder'
  url: str = ''
  splits: tuple[str, str, str] = ('train', '', 'test')
  keys: dict[str, str] = dataclasses.field(default_factory=dict)


_PER_CLASS = 'mean_per_class'
_WITH_VALIDATION = ('train', 'validation', 'test')

NAMED = {
  # The scored split of food101 and imagenet2012 is named validation in TFDS.
  'food101': Named(
    75_750, 25_250, tfds='food101', splits=('train', '', 'validation')
  ),
  'cifar10': Named(50_000, 10_000, tfds='cifar10'),
  'cifar100': Named(50_000, 10_000, tfds='cifar100'),
  'birdsnap': Named(
    42_283, 2_149, url='https://thomasberg.org (Berg et al. 2014)'
  ),
  'sun397': Named(
    19_850,
    19_850,
    tfds='sun397/standard-part1-120k',
    splits=('train', '', 'test'),
  ),
  'cars': Named(8_144, 8_041, tfds='cars196'),
  'aircraft': Named(
    6_667,
    3_333,
    _PER_CLASS,
    url='https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft',
  ),
  'voc2007': Named(
    5_011,
    4_952,
    'map_11_point',
    tfds='voc/2007',
    splits=_WITH_VALIDATION,
    # `labels` also has the objects marked difficult. An image that has only
    # difficult objects of a class is neither positive nor negative for it, as
    # in the VOC development kit and in ML-GCN's meter.
    keys={
      'label_key': '',
      'attributes_key': 'labels_no_difficult',
      'ignored_key': 'labels',
    },
  ),
  'dtd': Named(3_760, 1_880, tfds='dtd', splits=_WITH_VALIDATION),
  'pets': Named(3_680, 3_669, _PER_CLASS, tfds='oxford_iiit_pet'),
  'caltech101': Named(3_060, 6_085, _PER_CLASS, tfds='caltech101'),
  'flowers': Named(
    2_040,
    6_149,
    _PER_CLASS,
    tfds='oxford_flowers102',
    splits=_WITH_VALIDATION,
  ),
  'mnist': Named(60_000, 10_000, tfds='mnist'),
  'fer2013': Named(
    32_140,
    3_574,
    url='https://www.kaggle.com/c/challenges-in-representation-learning-'
    'facial-expression-recognition-challenge',
  ),
  'stl10': Named(1_000, 8_000, tfds='stl10'),
  # TFDS has one split of eurosat and resisc45; the ranges have MLCD's sizes.
  'eurosat': Named(
    10_000,
    5_000,
    tfds='eurosat/rgb',
    splits=('train[:10000]', '', 'train[10000:15000]'),
  ),
  'resisc45': Named(
    3_150,
    25_200,
    tfds='resisc45',
    splits=('train[:3150]', '', 'train[3150:28350]'),
  ),
  'gtsrb': Named(
    26_640, 12_630, url='https://benchmark.ini.rub.de/gtsrb_dataset.html'
  ),
  'kitti': Named(
    6_770,
    711,
    url='https://www.cvlibs.net/datasets/kitti (the distance of the nearest '
    'vehicle, four classes)',
  ),
  'country211': Named(
    42_200, 21_100, url='https://github.com/openai/CLIP/blob/main/data'
  ),
  'pcam': Named(
    294_912, 32_768, tfds='patch_camelyon', splits=_WITH_VALIDATION
  ),
  'ucf101': Named(
    9_537,
    1_794,
    url='https://www.crcv.ucf.edu/data/UCF101.php (the middle frames)',
  ),
  'kinetics700': Named(
    494_801,
    31_669,
    'mean_top1_top5',
    url='https://github.com/cvdfoundation/kinetics-dataset (the middle frames)',
  ),
  'clevr': Named(
    2_000,
    500,
    url='https://cs.stanford.edu/people/jcjohns/clevr (counts, eight classes)',
  ),
  'hateful_memes': Named(
    8_500, 500, 'roc_auc', url='https://hatefulmemeschallenge.com'
  ),
  'sst2': Named(
    7_792, 1_821, url='https://github.com/openai/CLIP/blob/main/data'
  ),
  'imagenet': Named(
    1_281_167, 50_000, tfds='imagenet2012', splits=('train', '', 'validation')
  ),
}  # fmt: skip

# The data sets of the multi_label task (Tan et al. 2024). COCO has 82,783 and
# 40,504 images; ML-GCN's coco.py keeps the 82,081 and 40,137 with annotations.
MULTI_LABEL = {
  'voc07': dataclasses.replace(NAMED['voc2007']),
  'coco': Named(
    82_081,
    40_137,
    source='coco',
    splits=('train2014', '', 'val2014'),
    keys={'label_key': ''},
  ),
  'nus_wide': Named(
    161_789,
    107_859,
    tfds='nus_wide',
    url='https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide',
    keys={'label_key': '', 'attributes_key': 'attributes'},
  ),
}

_ALL = NAMED | MULTI_LABEL


def with_named(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config with the data sets of evaluate.named added.

  Raises:
    UserError: a name is unknown.
  """
  names = config_lib.split_names(config.evaluate.named)
  if not names:
    return config
  config = config.copy_and_resolve_references()
  for name in NAMED if names == ['paper'] else names:
    if name not in _ALL:
      raise errors.UserError(
        f'evaluate.named: {name!r} is unknown; use paper, or any of: '
        + ', '.join(_ALL)
      )
    with config.unlocked():  # Configs from flags are locked.
      _add(config, name, _ALL[name])
  return config


def _add(config: ml_collections.ConfigDict, name: str, named: Named) -> None:
  """Adds one of the data sets to evaluate.datasets."""
  root = config.evaluate.data_dir
  train, validation, test = named.splits
  fields = dict(
    source='tfds',
    path=named.tfds,
    data_dir=root,
    image_key='image',
    label_key='label',
  )
  if not named.tfds:
    path = os.path.join(root, name)
    if named.source == 'folder':
      path = os.path.join(path, '{split}')
    fields |= dict(source=named.source, path=path, data_dir='')
  fields |= named.keys
  # Prompts name classes, so a data set with attributes only takes none.
  classes = bool(fields['label_key'])
  config_lib.add_dataset(
    config,
    name,
    train_split=train,
    validation_split=validation,
    test_split=test,
    metric=named.metric,
    prompts=name if name in prompts.known() and classes else '',
    **fields,
  )


def way_out(name: str, config: ml_collections.ConfigDict) -> str:
  """Returns the advice for an error about a named data set that is missing.

  Args:
    name: the name of the data set.
    config: the config of the run.

  Returns:
    The end of an error message; '' if the data set is not from evaluate.named
    or if the error of its source is enough.
  """
  named = _ALL.get(name)
  if named is None or name not in _asked(config):
    return ''
  if named.source == 'coco':
    return f', or name the folder that has {name}/ with evaluate.data_dir'
  if not named.url:
    return ''
  if named.tfds:
    return (
      f'; TFDS has no {named.tfds}: download it from {named.url} and write a '
      'builder of that name, with features image and attributes'
    )
  return (
    f'; download {name} by hand from {named.url} and put it into '
    f'{config.evaluate.data_dir or "evaluate.data_dir"}/{name}/train/CLASS and '
    f'.../test/CLASS, or name another folder with evaluate.data_dir'
  )


def check_sizes(
  name: str, config: ml_collections.ConfigDict, sizes: dict[str, int]
) -> None:
  """Warns if a named data set differs in size from the published one.

  Args:
    name: the name of the data set; one that is not from evaluate.named has no
      published size and passes.
    config: the config of the run.
    sizes: the number of images by split: train, validation and test.
  """
  if name not in _asked(config):
    return
  named = _ALL[name]
  found = sizes['train'] + sizes.get('validation', 0), sizes['test']
  if found != (named.train, named.test):
    _log.warning(
      'evaluate: %s has %d training and %d test images, the published split '
      '%d and %d; its scores are not comparable',
      name, *found, named.train, named.test,
    )  # fmt: skip


def _asked(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the names in evaluate.named; `paper` stands for all of NAMED."""
  names = config_lib.split_names(config.evaluate.named)
  return list(NAMED) if names == ['paper'] else names
