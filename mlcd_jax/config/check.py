"""Checks of a config before anything runs."""

import importlib.util

import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax.config import choices
from mlcd_jax.config import fields
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths


def check(
  config: ml_collections.ConfigDict, *, skip: tuple[str, ...] = ()
) -> None:
  """Checks types, choices, ranges and combinations of all fields.

  Args:
    config: the config; see `config.default`.
    skip: the sections whose choices are not checked.

  Raises:
    UserError: a field cannot be used; the message names the first one.
  """
  _check_fields(config)
  for field in fields.FIELDS:
    value = fields.get(config, field.name)
    if field.name.partition('.')[0] in skip and field.choices:
      continue
    if field.choices and value not in field.choices:
      raise errors.UserError(
        f'{field.name}={value!r} is unknown; use one of: '
        + ', '.join(field.choices)
      )
  for field in fields.FIELDS:
    value = fields.get(config, field.name)
    if field.low is not None and not field.low <= value <= field.high:
      raise errors.UserError(
        f'{field.name}={value} is outside {field.low:g} to {field.high:g}'
      )
  for check_section in (
    _check_data,
    _check_embed,
    _check_cluster,
    _check_training,
    _check_evaluate,
    _check_mesh,
  ):
    check_section(config)


def _check_fields(config: ml_collections.ConfigDict) -> None:
  """Checks that every field exists and has the type of its default."""
  for name, default, *_ in fields.FIELDS:
    try:
      given = fields.get(config, name)
    except (AttributeError, KeyError, TypeError) as e:
      raise errors.UserError(
        f'{name} is missing; begin a config with mlcd_jax.config.default()'
      ) from e
    accepted = (int, float) if isinstance(default, float) else type(default)
    if isinstance(default, tuple):
      accepted = (tuple, list)
    if isinstance(default, dict):
      accepted = ml_collections.ConfigDict
    if not isinstance(given, accepted):
      raise errors.UserError(
        f'{name}={given!r}: needs a value such as {default!r}'
      )


# Meaning of embed.path for the embedders that need it; errors show it.
_EMBED_PATHS = {
  'huggingface': 'a folder, or ORG/NAME[@REVISION]',
  'precomputed': 'a folder or URL with embeddings',
  'checkpoint': 'a workdir whose encoder is trained',
}


# A grid of 16 has 256 crops an image, each embedded as an image is.
_MAX_GRID = 16


def _check_data(c: ml_collections.ConfigDict) -> None:
  """Checks the source of the images and their crops."""
  if c.data.source == 'embedded' and c.data.path not in ('', *choices.EMBEDDED):
    raise errors.UserError(
      f'data.path={c.data.path}: data.source=embedded has '
      + ', '.join(choices.EMBEDDED)
      + '; name the source of your files with --config.data.source'
    )
  _check_objects(c.data, 'data')
  area = tuple(c.data.crop_area)
  if (
    len(area) != 2
    or not all(isinstance(a, (int, float)) for a in area)
    or not 0 < area[0] <= area[1] <= 1
  ):
    raise errors.UserError(
      f'data.crop_area={area}: needs (low, high) with 0 < low <= high <= 1'
    )


def _check_objects(data: ml_collections.ConfigDict, section: str) -> None:
  """Checks that the source has what the keys of objects name.

  Args:
    data: the fields of a data set.
    section: their section, for errors.
  """
  for field, known in (
    ('attributes_key', choices.WITH_ATTRIBUTES),
    ('boxes_key', choices.WITH_BOXES),
  ):
    key = data.get(field, '')
    if key and data.source not in known:
      raise errors.UserError(
        f'{section}.{field}={key}: {section}.source={data.source} has none; '
        f"set it to '', or use one of: " + ', '.join(known)
      )


def _check_embed(c: ml_collections.ConfigDict) -> None:
  """Checks the embedder and its path."""
  needed = _EMBED_PATHS.get(c.embed.embedder)
  if needed and not c.embed.path:
    raise errors.UserError(
      f'embed.path is empty: embed.embedder={c.embed.embedder} needs {needed}'
    )
  if c.embed.text_weight and c.embed.embedder != 'precomputed':
    raise errors.UserError(
      f'embed.text_weight={c.embed.text_weight}: embed.embedder='
      f'{c.embed.embedder} embeds images only; use precomputed, or 0'
    )
  views = tuple(c.embed.views)
  if len(set(views)) < len(views) or not all(
    type(grid) is int and 0 < grid <= _MAX_GRID for grid in views
  ):
    raise errors.UserError(
      f'embed.views={views}: needs different sizes of grids from 1 to '
      f'{_MAX_GRID}, such as (2, 3), or () for none'
    )
  if views and c.embed.embedder == 'precomputed':
    raise errors.UserError(
      f'embed.views={views}: embed.embedder=precomputed sees no images; use '
      'another embedder, or ()'
    )


def _check_cluster(c: ml_collections.ConfigDict) -> None:
  """Checks that the numbers of centers, labels and levels fit each other."""
  for field in ('cluster.fit_on', 'cluster.rule'):
    # With cluster.path the views were embedded in another run, if at all.
    if fields.get(c, field) == 'views' and not (
      c.embed.views or c.cluster.path
    ):
      raise errors.UserError(
        f'{field}=views needs the views of embed.views, such as (2, 3)'
      )
  if c.loss.num_positives > c.cluster.num_labels:
    raise errors.UserError(
      f'loss.num_positives={c.loss.num_positives} is more than '
      f'cluster.num_labels={c.cluster.num_labels}, the labels stored'
    )
  levels = tuple(c.cluster.levels)
  if levels and not c.cluster.num_centers:
    raise errors.UserError(
      f'cluster.levels={levels}: needs cluster.num_centers=k1 * k2, not 0'
    )
  if levels and (
    len(levels) != 2
    or not all(isinstance(k, int) and k > 0 for k in levels)
    or levels[0] * levels[1] != c.cluster.num_centers
  ):
    raise errors.UserError(
      f'cluster.levels={levels}: needs (k1, k2) with k1 * k2 = '
      f'cluster.num_centers={c.cluster.num_centers}, or () for flat'
    )
  if 0 < c.cluster.num_centers < c.cluster.num_labels:
    raise errors.UserError(
      f'cluster.num_labels={c.cluster.num_labels} is more than '
      f'cluster.num_centers={c.cluster.num_centers}'
    )
  if c.cluster.path and not paths.local(c.cluster.path).is_dir():
    raise errors.UserError(
      f'cluster.path={c.cluster.path}: no such folder; name a workdir whose '
      'cluster stage is done'
    )


def _check_training(c: ml_collections.ConfigDict) -> None:
  """Checks the loss, the optimizer and the length of the run."""
  if 0 < c.train.max_loss_ratio <= 1:
    raise errors.UserError(
      f'train.max_loss_ratio={c.train.max_loss_ratio}: needs more than 1, such '
      'as 2, or 0 for off'
    )
  if c.train.keep_best and '/' not in c.train.keep_best:
    raise errors.UserError(
      f'train.keep_best={c.train.keep_best}: needs a name of metrics.jsonl, '
      'such as train/loss'
    )
  steps = tuple(c.train.profile_steps)
  if steps and not (
    len(steps) == 2
    and all(type(step) is int for step in steps)
    and 0 < steps[0] <= steps[1]
  ):
    raise errors.UserError(
      f'train.profile_steps={steps}: needs (first, last), counted from 1, such '
      'as (10, 14), or () for none'
    )
  if c.train.wandb_project and not importlib.util.find_spec('wandb'):
    raise errors.UserError(
      f'train.wandb_project={c.train.wandb_project}: the package is not '
      "installed; pip install wandb, or set it to ''"
    )
  if bool(c.train.steps) == bool(c.train.epochs):
    raise errors.UserError(
      f'train.steps={c.train.steps} and train.epochs={c.train.epochs}: '
      'set one of them and leave the other 0'
    )
  if c.model.init_classifier == 'kept' and not c.model.init_from:
    raise errors.UserError(
      'model.init_classifier=kept needs model.init_from, a workdir whose '
      'classifier is kept'
    )
  if c.loss.name == 'softmax' and c.loss.num_positives != 1:
    raise errors.UserError(
      f'loss.num_positives={c.loss.num_positives}: loss.name=softmax has '
      'one label; set loss.num_positives=1'
    )
  for rule in c.optimizer.multipliers:
    if len(rule) != 2 or not isinstance(rule[0], str):
      raise errors.UserError(
        f'optimizer.multipliers: {rule!r} is no (pattern, factor)'
      )


def _check_evaluate(c: ml_collections.ConfigDict) -> None:
  """Checks the tasks, the baselines and the data sets to evaluate on."""
  for field, known in (
    ('evaluate.tasks', (*config_lib.TASKS, 'all')),
    ('evaluate.baselines', choices.BASELINES),
  ):
    for name in config_lib.split_names(fields.get(c, field)):
      if name not in known:
        raise errors.UserError(
          f'{field}: {name!r} is unknown; use any of: ' + ', '.join(known)
        )
  for name, dataset in c.evaluate.datasets.items():
    if dataset.source not in config_lib.SOURCES:
      raise errors.UserError(
        f'evaluate.datasets.{name}.source={dataset.source!r} is unknown; '
        'use one of: ' + ', '.join(config_lib.SOURCES)
      )
    _check_objects(dataset, f'evaluate.datasets.{name}')
    metric = dataset.get('metric', 'accuracy')
    if metric not in config_lib.METRICS:
      raise errors.UserError(
        f'evaluate.datasets.{name}.metric={metric!r} is unknown; use one of: '
        + ', '.join(config_lib.METRICS)
      )


def _check_mesh(c: ml_collections.ConfigDict) -> None:
  """Checks the number of devices on each axis of the mesh."""
  if c.mesh.slices < 1:
    raise errors.UserError(f'mesh.slices={c.mesh.slices}: use at least 1')
  for field in ('mesh.data', 'mesh.fsdp'):
    if fields.get(c, field) < 1 and fields.get(c, field) != -1:
      raise errors.UserError(
        f'{field}={fields.get(c, field)}: use -1 or at least 1'
      )
