"""Every config field with its default, and the checks a config must pass."""

import pathlib
from typing import Any

import ml_collections

from mlcd_jax import errors

SOURCES = (
  'embedded',
  'tfds',
  'webdataset',
  'folder',
  'array_record',
  'parquet',
)
EMBEDDERS = ('hog', 'huggingface')
LOSSES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
TASKS = ('linear', 'knn', 'few_shot')


def default() -> ml_collections.ConfigDict:
  """Returns a config with every field; configs/*.py change what they need."""
  c = ml_collections.ConfigDict()
  c.seed = 0

  c.data = ml_collections.ConfigDict()
  c.data.source = 'embedded'  # One of SOURCES.
  # tfds: the data set's name. Otherwise a path, glob or range such as
  # {00000..00099}, local or an fsspec URL; {split} stands for the split.
  c.data.path = ''
  c.data.data_dir = ''  # tfds: where it was prepared; '' = TFDS's default.
  c.data.split = 'train'  # The split that is clustered and trained on.
  # The feature or column, or in tars the suffix, of each part of a record.
  c.data.image_key = 'image'
  c.data.label_key = 'label'  # The class, for evaluation only.
  c.data.caption_key = 'caption'
  c.data.bad_keys = ''  # Keys to leave out; '' = bad_keys.txt in the workdir.
  c.data.cache_dir = ''  # Indices and copies; '' = ~/.cache/mlcd_jax.
  c.data.num_workers = 0  # Decoding processes, above 16 cores; 0 = threads.
  c.data.max_bad_fraction = 0.01  # Above it, bad images stop the run.
  c.data.crop_area = (0.7, 1.0)  # Share of the image a training crop keeps.
  c.data.flip = True  # Mirror half of the training crops.

  c.embed = ml_collections.ConfigDict()
  c.embed.embedder = 'hog'  # hog | huggingface
  # huggingface: a folder as transformers writes it, or ORG/NAME[@REVISION].
  c.embed.path = ''
  c.embed.dtype = 'float32'  # huggingface: of the products; or bfloat16.
  c.embed.image_size = 0  # Pixels; 0 = the embedder's own.
  c.embed.batch_size = 64  # Images per device and call.
  c.embed.shard_rows = 65_536  # Records per embedding file.

  c.cluster = ml_collections.ConfigDict()
  c.cluster.num_centers = 1_000
  c.cluster.iterations = 25
  c.cluster.tolerance = 0.0  # Stop at a smaller relative gain; 0 = never.
  c.cluster.screening = 'auto'  # auto (CPUs: by leading dimensions) | off
  c.cluster.num_labels = 10  # Nearest centers stored for every image.
  c.cluster.path = ''  # Another workdir whose clusters are read in place.

  c.model = ml_collections.ConfigDict()
  c.model.variant = 'B/16'
  c.model.image_size = 224
  c.model.embedding_dim = 512  # Width of the classifier's input.
  c.model.pooling = 'class_token'  # class_token | average | attention
  # learned: a table. rope2d: queries and keys turn, for any resolution.
  c.model.position = 'learned'
  c.model.activation = 'gelu'  # gelu | quick_gelu | gelu_tanh
  c.model.dtype = 'bfloat16'  # Of the products; weights stay float32.
  c.model.remat = 'none'  # Kept for the backward pass: none | dots | full.
  c.model.scan_layers = False  # Compile one block and loop over it.
  # Weights to start from: a workdir, a folder of `convert import` or of
  # transformers, or ORG/NAME[@REVISION]; '' = random ones.
  c.model.init_from = ''
  # fresh; kept: as in the workdir model.init_from; centers: the clusters'.
  c.model.init_classifier = 'fresh'
  c.model.drop_path = 0.0  # Chance that the last block is skipped.

  c.loss = ml_collections.ConfigDict()
  # mlcd (Eq. 5) | mlc (Eq. 4) | softmax | mean_softmax | sigmoid
  c.loss.name = 'mlcd'
  c.loss.num_positives = 8  # Nearest centers used as labels.
  c.loss.label_choice = 'nearest'  # random: anew each step, of all stored.
  c.loss.min_similarity = -1.0  # Labels of a lower cosine are left out.
  c.loss.margin = 0.3  # Subtracted from a positive's cosine, or its radians.
  c.loss.margin_type = 'cosface'  # cosface | arcface
  c.loss.scale = 64.0
  c.loss.sample_rate = 0.1  # Share of all classes drawn as negatives a step.
  c.loss.negatives = 'uniform'  # partial_fc: the batch's positives first.
  c.loss.interclass_filter = (
    0.0  # Negatives' cosines above count as 0; 0 = off.
  )
  c.loss.chunk_megabytes = 256.0  # Of a device's logits that exist at a time.

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.learning_rate = 1e-3
  c.optimizer.weight_decay = 0.2
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.schedule = 'cosine'  # cosine | polynomial | constant
  c.optimizer.warmup_steps = 0.1  # Steps, or below 1 a fraction of the run.
  c.optimizer.gradient_clip_norm = 5.0  # 0 = off.
  c.optimizer.head_learning_rate_multiplier = 1.0  # For the classifier.
  c.optimizer.head_update = 'dense'  # sparse: only classes with a gradient.
  # (pattern of names, factor) of learning rates; 0 freezes.
  c.optimizer.multipliers = ()

  c.train = ml_collections.ConfigDict()
  c.train.steps = 0  # Either steps or epochs.
  c.train.epochs = 0.0
  c.train.batch_size = 256  # Images a step, over all devices.
  c.train.accumulate_steps = 1  # Parts of a batch, one after the other.
  c.train.ema_decay = 0.0  # Of an average of the encoder, then used; 0 = off.
  c.train.checkpoint_every_steps = 1_000
  c.train.checkpoint_every_minutes = 0.0  # Of these as well; 0 = off.
  c.train.keep_checkpoints = 2  # The last ones.
  c.train.keep_every_steps = 0  # And for good those of multiples; 0 = none.
  # Batches with a loss or gradient that is not finite, left out in this
  # invocation before the run stops.
  c.train.max_skipped_steps = 0
  c.train.log_every_steps = 50
  c.train.stop_after_steps = 0  # Steps in this invocation; 0 = to the end.

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # Devices that split batch and points; -1 = the rest.
  c.mesh.fsdp = 1  # Devices that also split the weights and the centers.
  c.mesh.slices = 1  # Of TPU chips, or hosts of GPUs, that mesh.data spans.

  c.evaluate = ml_collections.ConfigDict()
  c.evaluate.tasks = TASKS
  c.evaluate.batch_size = 256  # Images a call, over all devices.
  c.evaluate.datasets = ml_collections.ConfigDict()
  return c


def add_dataset(
  config: ml_collections.ConfigDict,
  name: str,
  *,
  train_split: str = 'train',
  test_split: str = 'test',
  **data: Any,
) -> None:
  """Adds a labelled data set to evaluate on; `data` overrides data.* fields."""
  dataset = ml_collections.ConfigDict(
    dict(train_split=train_split, test_split=test_split)
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


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns plain JSON types, tuples as lists."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(v) for v in value]
    return value

  return plain(config.to_dict())


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
    'data.source': SOURCES,
    'embed.embedder': EMBEDDERS,
    'embed.dtype': ('float32', 'bfloat16'),
    'model.pooling': ('class_token', 'average', 'attention'),
    'model.position': ('learned', 'rope2d'),
    'model.activation': ('gelu', 'quick_gelu', 'gelu_tanh'),
    'model.init_classifier': ('fresh', 'kept', 'centers'),
    'model.dtype': ('float32', 'bfloat16'),
    'model.remat': ('none', 'dots', 'full'),
    'loss.name': LOSSES,
    'cluster.screening': ('auto', 'off'),
    'loss.label_choice': ('nearest', 'random'),
    'loss.margin_type': ('cosface', 'arcface'),
    'loss.negatives': ('uniform', 'partial_fc'),
    'optimizer.schedule': ('cosine', 'polynomial', 'constant'),
    'optimizer.head_update': ('dense', 'sparse'),
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
  _check_together(config)


def _check_fields(config: ml_collections.ConfigDict) -> None:
  """Every field of `default` must be there, with a value of its type."""
  known = default()
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
  ('embed.image_size', 0, 16_384),
  ('embed.batch_size', 1, _MOST),
  ('embed.shard_rows', 1, _MOST),
  ('cluster.num_centers', 1, _MOST),
  ('cluster.iterations', 1, _MOST),
  ('cluster.tolerance', 0, 1),
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
  ('train.log_every_steps', 1, _MOST),
  ('train.stop_after_steps', 0, _MOST),
  ('evaluate.batch_size', 1, _MOST),
)


def _check_together(c: ml_collections.ConfigDict) -> None:
  """Checks of more than one field."""
  if bool(c.train.steps) == bool(c.train.epochs):
    raise errors.UserError(
      f'train.steps={c.train.steps} and train.epochs={c.train.epochs}: '
      'set one of them and leave the other 0'
    )
  if c.embed.embedder == 'huggingface' and not c.embed.path:
    raise errors.UserError(
      'embed.path is empty: embed.embedder=huggingface needs a folder, or '
      'ORG/NAME[@REVISION]'
    )
  if c.model.init_classifier == 'kept' and not c.model.init_from:
    raise errors.UserError(
      'model.init_classifier=kept needs model.init_from, a workdir whose '
      'classifier is kept'
    )
  if c.data.source == 'embedded' and c.data.path not in ('', 'digits'):
    raise errors.UserError(
      f'data.path={c.data.path}: data.source=embedded has only digits; name '
      'the source of your files with --config.data.source'
    )
  if c.loss.num_positives > c.cluster.num_labels:
    raise errors.UserError(
      f'loss.num_positives={c.loss.num_positives} is more than '
      f'cluster.num_labels={c.cluster.num_labels}, the labels stored'
    )
  if c.cluster.num_labels > c.cluster.num_centers:
    raise errors.UserError(
      f'cluster.num_labels={c.cluster.num_labels} is more than '
      f'cluster.num_centers={c.cluster.num_centers}'
    )
  if c.loss.name == 'softmax' and c.loss.num_positives != 1:
    raise errors.UserError(
      f'loss.num_positives={c.loss.num_positives}: loss.name=softmax has '
      'one label; set loss.num_positives=1'
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
  for task in c.evaluate.tasks:
    if task not in TASKS:
      raise errors.UserError(
        f'evaluate.tasks: {task!r} is unknown; use any of: ' + ', '.join(TASKS)
      )
  for name, dataset in c.evaluate.datasets.items():
    if dataset.source not in SOURCES:
      raise errors.UserError(
        f'evaluate.datasets.{name}.source={dataset.source!r} is unknown; '
        'use one of: ' + ', '.join(SOURCES)
      )
  if c.mesh.slices < 1:
    raise errors.UserError(f'mesh.slices={c.mesh.slices}: use at least 1')
  for rule in c.optimizer.multipliers:
    if len(rule) != 2 or not isinstance(rule[0], str):
      raise errors.UserError(
        f'optimizer.multipliers: {rule!r} is no (pattern, factor)'
      )
  for field in ('mesh.data', 'mesh.fsdp'):
    if _get(c, field) < 1 and _get(c, field) != -1:
      raise errors.UserError(f'{field}={_get(c, field)}: use -1 or at least 1')
  if c.cluster.path and not pathlib.Path(c.cluster.path).is_dir():
    raise errors.UserError(
      f'cluster.path={c.cluster.path}: no such folder; name a workdir whose '
      'cluster stage is done'
    )


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
  """Returns the value of a dotted field."""
  value = config
  for part in field.split('.'):
    value = value[part]
  return value
