"""The checks that a config must pass before anything runs."""

import importlib.util
from typing import Any

import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths


def check(
  config: ml_collections.ConfigDict, *, skip: tuple[str, ...] = ()
) -> None:
  """Raises UserError naming the first field that cannot be used.

  Args:
    config: see `default`.
    skip: sections whose choices are not checked.
  """
  _check_fields(config)
  for field, choices in {
    'data.source': config_lib.SOURCES,
    'embed.embedder': config_lib.EMBEDDERS,
    'embed.dtype': ('float32', 'bfloat16'),
    'model.pooling': ('class_token', 'average', 'attention'),
    'model.position': ('learned', 'rope2d'),
    'model.activation': ('gelu', 'quick_gelu', 'gelu_tanh'),
    'model.init_classifier': ('fresh', 'kept', 'centers'),
    'model.dtype': ('float32', 'bfloat16'),
    'model.remat': ('none', 'dots', 'full'),
    'loss.name': config_lib.LOSSES,
    'cluster.method': ('auto', 'exact'),
    'loss.label_choice': ('nearest', 'random'),
    'loss.margin_type': ('cosface', 'arcface'),
    'loss.negatives': ('uniform', 'partial_fc'),
    'optimizer.schedule': ('cosine', 'polynomial', 'constant'),
    'optimizer.head_update': ('dense', 'sparse'),
    'train.best_is': ('lowest', 'highest'),
    'lit.loss': ('softmax', 'sigmoid'),
    'lit.dtype': ('float32', 'bfloat16'),
  }.items():
    if field.partition('.')[0] in skip:
      continue
    if _get(config, field) not in choices:
      raise errors.UserError(
        f'{field}={_get(config, field)!r} is unknown; use one of: '
        + ', '.join(choices)
      )
  for field, low, high in _RANGES:
    value = _get(config, field)
    if not low <= value <= high:
      raise errors.UserError(f'{field}={value} is outside {low:g} to {high:g}')
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
  """Every field of `default` must be there, with a value of its type."""
  known = config_lib.default()
  for section in known:
    fields = known[section]
    if not isinstance(fields, ml_collections.ConfigDict):
      fields = {'': fields}
    for name, value in fields.items():
      field = f'{section}.{name}' if name else section
      try:
        given = _get(config, field)
      except (AttributeError, KeyError, TypeError) as e:
        raise errors.UserError(
          f'{field} is missing; begin a config with mlcd_jax.config.default()'
        ) from e
      accepted = (int, float) if isinstance(value, float) else type(value)
      if isinstance(value, tuple):
        accepted = (tuple, list)
      if not isinstance(given, accepted):
        raise errors.UserError(
          f'{field}={given!r}: needs a value such as {value!r}'
        )


_MOST = 2**31 - 1
_RANGES = (
  ('seed', 0, _MOST),
  ('data.num_workers', 0, 1_024),
  ('data.max_bad_fraction', 0, 1),
  ('embed.text_weight', 0, 1),
  ('embed.image_size', 0, 16_384),
  ('embed.batch_size', 1, _MOST),
  ('embed.shard_rows', 1, _MOST),
  ('cluster.num_centers', 1, _MOST),
  ('cluster.iterations', 1, _MOST),
  ('cluster.tolerance', 0, 1),
  ('cluster.repair_iterations', 1, _MOST),
  ('cluster.num_labels', 1, 1_024),
  ('model.image_size', 1, 16_384),
  ('model.embedding_dim', 1, 65_536),
  ('model.drop_path', 0, 0.999),
  ('loss.num_positives', 1, 1_024),
  ('loss.min_similarity', -1, 1),
  ('loss.margin', 0, 2),
  ('loss.scale', 1e-6, 1e6),
  ('loss.sample_rate', 1e-9, 1),
  ('loss.interclass_filter', 0, 1),
  ('loss.chunk_megabytes', 1e-3, 1e6),
  ('optimizer.learning_rate', 0, 1e3),
  ('optimizer.weight_decay', 0, 1e3),
  ('optimizer.b1', 0, 0.999999),
  ('optimizer.b2', 0, 0.999999),
  ('optimizer.warmup_steps', 0, _MOST),
  ('optimizer.gradient_clip_norm', 0, 1e9),
  ('optimizer.head_learning_rate_multiplier', 0, 1e6),
  ('train.steps', 0, _MOST),
  ('train.epochs', 0, 1e6),
  ('train.batch_size', 1, _MOST),
  ('train.accumulate_steps', 1, _MOST),
  ('train.ema_decay', 0, 1),
  ('train.checkpoint_every_steps', 1, _MOST),
  ('train.checkpoint_every_minutes', 0, 1e6),
  ('train.keep_checkpoints', 1, 1_000_000),
  ('train.keep_every_steps', 0, _MOST),
  ('train.max_skipped_steps', 0, _MOST),
  ('train.max_loss_ratio', 0, 1e6),
  ('train.log_every_steps', 1, _MOST),
  ('train.stop_after_steps', 0, _MOST),
  ('evaluate.batch_size', 1, _MOST),
  ('evaluate.every_steps', 0, _MOST),
  ('evaluate.finetune_epochs', 0, 1e6),
  ('evaluate.finetune_batch_size', 1, _MOST),
  ('evaluate.finetune_learning_rate', 0, 1e3),
  ('evaluate.finetune_layer_decay', 0, 1),
  ('lit.steps', 0, _MOST),
  ('lit.batch_size', 1, _MOST),
  ('lit.learning_rate', 0, 1e3),
  ('lit.width', 1, 65_536),
  ('lit.depth', 1, 1_024),
  ('lit.context', 3, 1_024),
)


# What embed.path names, of the embedders that need it.
_EMBED_PATHS = {
  'huggingface': 'a folder, or ORG/NAME[@REVISION]',
  'precomputed': 'a folder or URL with embeddings',
  'checkpoint': 'a workdir whose encoder is trained',
}


def _check_data(c: ml_collections.ConfigDict) -> None:
  """Where images come from and how they are cropped."""
  if c.data.source == 'embedded' and c.data.path not in ('', 'digits'):
    raise errors.UserError(
      f'data.path={c.data.path}: data.source=embedded has only digits; name '
      'the source of your files with --config.data.source'
    )
  area = tuple(c.data.crop_area)
  if (
    len(area) != 2
    or not all(isinstance(a, (int, float)) for a in area)
    or not 0 < area[0] <= area[1] <= 1
  ):
    raise errors.UserError(
      f'data.crop_area={area}: needs (low, high) with 0 < low <= high <= 1'
    )


def _check_embed(c: ml_collections.ConfigDict) -> None:
  """What embeds, and from what."""
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


def _check_cluster(c: ml_collections.ConfigDict) -> None:
  """Numbers of centers and labels that fit each other."""
  if c.loss.num_positives > c.cluster.num_labels:
    raise errors.UserError(
      f'loss.num_positives={c.loss.num_positives} is more than '
      f'cluster.num_labels={c.cluster.num_labels}, the labels stored'
    )
  levels = tuple(c.cluster.levels)
  if levels and (
    len(levels) != 2
    or not all(isinstance(k, int) and k > 0 for k in levels)
    or levels[0] * levels[1] != c.cluster.num_centers
  ):
    raise errors.UserError(
      f'cluster.levels={levels}: needs (k1, k2) with k1 * k2 = '
      f'cluster.num_centers={c.cluster.num_centers}, or () for flat'
    )
  if c.cluster.num_labels > c.cluster.num_centers:
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
  """The loss, the optimizer and the length of the run."""
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
  """Tasks, and the data sets they run on."""
  for task in config_lib.split_names(c.evaluate.tasks):
    if task not in (*config_lib.TASKS, 'all'):
      raise errors.UserError(
        f'evaluate.tasks: {task!r} is unknown; use any of: '
        + ', '.join((*config_lib.TASKS, 'all'))
      )
  for name, dataset in c.evaluate.datasets.items():
    if dataset.source not in config_lib.SOURCES:
      raise errors.UserError(
        f'evaluate.datasets.{name}.source={dataset.source!r} is unknown; '
        'use one of: ' + ', '.join(config_lib.SOURCES)
      )
    metric = dataset.get('metric', 'accuracy')
    if metric not in config_lib.METRICS:
      raise errors.UserError(
        f'evaluate.datasets.{name}.metric={metric!r} is unknown; use one of: '
        + ', '.join(config_lib.METRICS)
      )


def _check_mesh(c: ml_collections.ConfigDict) -> None:
  """Devices on each axis."""
  if c.mesh.slices < 1:
    raise errors.UserError(f'mesh.slices={c.mesh.slices}: use at least 1')
  for field in ('mesh.data', 'mesh.fsdp'):
    if _get(c, field) < 1 and _get(c, field) != -1:
      raise errors.UserError(f'{field}={_get(c, field)}: use -1 or at least 1')


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
  """Returns the value of a dotted field."""
  value = config
  for part in field.split('.'):
    value = value[part]
  return value
