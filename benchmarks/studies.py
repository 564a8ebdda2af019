"""What benchmarks/study.py runs: small grids over config fields.

The digits' studies are the quickstart at 300 of its 900 steps, the emoji's the
same model on 64-pixel images of one vendor, 2.3 a cluster again. A seed makes
clusters, first weights, order of the data and crops anew. The losses' own
settings are chosen on seed 100, and the losses then compared on others.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Cells are every combination of `grid` with every entry of `cells`.

  Attributes:
    title: of its table.
    config: as --config takes it.
    settings: fields of every cell, by dotted names. '{data}' in a value is
      --data, '{previous}' the workdir of the cell before, which is run first.
    grid: field -> values.
    cells: fields that change together.
    seeds: a run each.
    baselines: score the embedder, a random encoder and raw pixels too.
    score: 'run', what the config evaluates; 'paired', the multi-label probe
      and its scores without groups of test images; or 'emoji'.
    metrics: columns of the table, as results.json names them, and headings.
    against: the cell, by its fields, that the others are compared with.
    names: what rows call cells with these fields, instead of the fields.
  """

  title: str
  config: str
  settings: Mapping[str, Any]
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  cells: Sequence[Mapping[str, Any]] = ({},)
  seeds: Sequence[int] = (1, 2, 3)
  baselines: bool = False
  score: str = 'run'
  metrics: Mapping[str, str]
  against: Mapping[str, Any] | None = None
  names: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  def points(self) -> list[dict[str, Any]]:
    """Returns the fields that tell each cell of the grid from the others."""
    return [
      {**fields, **dict(zip(self.grid, values))}
      for values in itertools.product(*self.grid.values())
      for fields in self.cells
    ]

  def say(self, point: Mapping[str, Any]) -> str:
    """Returns what the row of a cell says."""
    said, named = [], {}
    for name, fields in self.names.items():
      if all(point.get(k) == v for k, v in fields.items()):
        said, named = [name], fields
    said += [f'{k}={v}' for k, v in point.items() if k not in named]
    return ', '.join(said) or 'as it is'

  def fields(self, point: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a cell that differ from the config, as JSON has them."""
    return json.loads(json.dumps({**self.settings, **point}))


_DIGITS = dict(
  config='configs/quickstart.py',
  metrics={
    'trained/digits/linear/accuracy': 'linear probe',
    'trained/digits/few_shot/accuracy': 'few-shot',
    'trained/digits/knn/accuracy': 'kNN',
  },
)
# What the quickstart had before these studies.
_BEFORE = {
  'loss.name': 'mlcd',
  'loss.scale': 32.0,
  'loss.margin': 0.3,
  'optimizer.learning_rate': 2e-3,
}
_DIGITS_SETTINGS = _BEFORE | {
  'train.steps': 300,
  'train.checkpoint_every_steps': 300,
  'cluster.num_labels': 32,
}


def _digits(title: str, settings: Mapping[str, Any] | None = None, **others):
  settings = _DIGITS_SETTINGS | dict(settings or {})
  return Study(title=title, settings=settings, **(_DIGITS | others))


_EMOJI_SETTINGS = _BEFORE | {
  'data.source': 'webdataset',
  'data.path': '{data}/noto.tar',
  'data.caption_key': 'json',
  'data.crop_area': (0.5, 1.0),
  'embed.image_size': 56,
  'cluster.num_centers': 800,
  'model.variant': 'Nano/16',
  'model.image_size': 64,
  'train.steps': 300,
  'train.checkpoint_every_steps': 300,
  'cluster.num_labels': 32,
}


def _emoji(title: str, settings: Mapping[str, Any] | None = None, **others):
  return Study(
    title=title,
    config='configs/quickstart.py',
    settings=_EMOJI_SETTINGS | dict(settings or {}),
    score='emoji',
    metrics={
      'trained/category_accuracy': 'category, linear probe',
      'trained/twin_recall1': 'twin, recall@1',
      'trained/twin_recall10': 'twin, recall@10',
    },
    **others,
  )


_LABELS = 'loss.num_positives'
_LOSSES = (
  {'loss.name': 'mlcd'},
  {'loss.name': 'mlc'},
  {'loss.name': 'mean_softmax'},
  {'loss.name': 'sigmoid'},
  {'loss.name': 'softmax', _LABELS: 1},
)


_SCALE = 'loss.scale'
_MARGIN = 'loss.margin'
_RATE = 'optimizer.learning_rate'


def _each(*settings: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
  """Every form of the loss with settings of its own."""
  return tuple(
    {**loss, **chosen} for loss, chosen in zip(_LOSSES, settings, strict=True)
  )


# The best of digits_losses_scale by the sum of the metrics; no other margin was
# better by more than 1.
_SCALED = _each(
  {_SCALE: 16.0}, {_SCALE: 16.0}, {_SCALE: 32.0}, {_SCALE: 32.0}, {_SCALE: 32.0}
)

# And the best of digits_losses_rate, where another is better by more than 1.
_RATES = (4e-3, 2e-3, 4e-3, 4e-3, 2e-3)
_TUNED = tuple(
  {**loss, _RATE: rate} for loss, rate in zip(_SCALED, _RATES, strict=True)
)

# Students of scenes. Each arm is one way to label a scene: what the centers are
# of, which of them become labels, and the loss that suits their number.
_SCENES_SETTINGS = {
  'model.image_size': 40,
  'train.steps': 600,
  'train.checkpoint_every_steps': 600,
  'cluster.num_labels': 8,
}
# Choices are made on the validation scenes.
_ON_VALIDATION = {
  'evaluate.datasets.scenes.test_split': 'validation',
  'evaluate.datasets.scenes.validation_split': '',
}
_OF_IMAGES = {
  'embed.image_size': 56,
  'embed.views': (),
  'cluster.fit_on': 'images',
  'cluster.rule': 'nearest',
}
_ONE = _OF_IMAGES | {_LABELS: 1, 'loss.name': 'softmax', _SCALE: 32.0}
_NEAREST = _OF_IMAGES | {_LABELS: 8}
_VIEWS = {'cluster.fit_on': 'views', 'cluster.rule': 'views', _LABELS: 8}
_PURSUIT = {'cluster.fit_on': 'views', 'cluster.rule': 'pursuit', _LABELS: 8}
_ARMS = (_ONE, _NEAREST, _VIEWS, _PURSUIT)
# The best of scenes_classes by presence mAP.
_AT_BEST_CLASSES = tuple(
  {**arm, 'cluster.num_centers': count}
  for arm, count in zip((_ONE, _NEAREST, _VIEWS), (200, 800, 200), strict=True)
)
# And of scenes_rates.
_AT_BEST = tuple(
  {**arm, _RATE: rate}
  for arm, rate in zip(_AT_BEST_CLASSES, (4e-3, 8e-3, 8e-3), strict=True)
)
_ARM_NAMES = {
  '1 nearest center': _ONE,
  '8 nearest centers': _NEAREST,
  'centers of the crops': _VIEWS,
  'pursuit': _PURSUIT,
}


def _scenes(title: str, settings: Mapping[str, Any] | None = None, **others):
  return Study(
    names=_ARM_NAMES,
    title=title,
    config='configs/scenes.py',
    settings=_SCENES_SETTINGS | dict(settings or {}),
    metrics={
      'trained/scenes/multi_label/mAP': 'presence mAP',
      'trained/scenes/multi_label/exact_set': 'exact set',
    },
    **others,
  )


STUDIES = {
  'scenes_classes': _scenes(
    'Scenes: classes of each kind of labels, to choose from',
    _ON_VALIDATION,
    grid={'cluster.num_centers': (50, 200, 800)},
    cells=_ARMS,
    seeds=(100,),
  ),
  'scenes_rates': _scenes(
    'Scenes: learning rates, each kind of labels at its best number of classes',
    _ON_VALIDATION,
    grid={_RATE: (2e-3, 4e-3, 8e-3)},
    cells=_AT_BEST_CLASSES,
    seeds=(100,),
  ),
  'scenes_rules': _scenes(
    'Scenes: labels of three kinds, each at its best',
    cells=_AT_BEST,
    seeds=(1, 2, 3, 4, 5),
    score='paired',
    against=_AT_BEST[0],
  ),
  'digits_losses_scale': _digits(
    'Scales of the losses, to choose from',
    grid={_SCALE: (8.0, 16.0, 32.0, 64.0)},
    cells=_LOSSES,
    seeds=(100,),
  ),
  'digits_losses_margin': _digits(
    'Margins of the losses, each at its best scale',
    grid={_MARGIN: (0.0, 0.15, 0.3, 0.5)},
    cells=_SCALED,
    seeds=(100,),
  ),
  'digits_losses_rate': _digits(
    'Learning rates of the losses, each at its best scale and margin',
    grid={_RATE: (1e-3, 2e-3, 4e-3, 8e-3)},
    cells=_SCALED,
    seeds=(100,),
  ),
  'digits_losses': _digits(
    'Losses, each at its best settings, 900 steps',
    {'train.steps': 900, 'train.checkpoint_every_steps': 900},
    cells=_TUNED,
    against=_TUNED[0],
  ),
  'digits_positives': _digits(
    'Labels an image',
    grid={_LABELS: (1, 2, 4, 8, 16, 32)},
    against={_LABELS: 8},
  ),
  'digits_classes': _digits(
    'Classes, and labels an image',
    grid={
      'cluster.num_centers': (100, 500, 1_500, 2_500),
      _LABELS: (1, 8),
    },
  ),
  'digits_sample_rate': _digits(
    'Share of the classes drawn as negatives',
    grid={'loss.sample_rate': (0.01, 0.03, 0.1, 0.3, 1.0)},
    against={'loss.sample_rate': 1.0},
  ),
  'digits_scale': _digits(
    'Scale',
    grid={_SCALE: (8.0, 16.0, 32.0, 64.0)},
    against={_SCALE: 32.0},
  ),
  'digits_margin': _digits(
    'Margin',
    grid={_MARGIN: (0.0, 0.15, 0.3, 0.5)},
    against={_MARGIN: 0.3},
  ),
  'digits_threshold': _digits(
    'Of 16 labels, those above a cosine',
    {_LABELS: 16},
    grid={'loss.min_similarity': (-1.0, 0.5, 0.7)},
    against={'loss.min_similarity': -1.0},
  ),
  'digits_rounds': _digits(
    "Labels of HOG, then of the student's own features",
    cells=(
      {},
      {'embed.embedder': 'checkpoint', 'embed.path': '{previous}'},
    ),
    against={},
  ),
  'digits_baselines': _digits('Baselines', baselines=True),
  'emoji_losses': _emoji(
    'Emoji: losses, each at its best scale on the digits',
    cells=_SCALED,
    against=_SCALED[0],
  ),
  'emoji_positives': _emoji(
    'Emoji: labels an image',
    grid={_LABELS: (1, 8, 16)},
    against={_LABELS: 8},
  ),
  'emoji_baselines': _emoji('Emoji: baselines', seeds=(1,), baselines=True),
}
