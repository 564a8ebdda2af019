"""Every config field with its default."""

from collections.abc import Sequence
from typing import Any

import ml_collections

SOURCES = (
  'embedded',
  'tfds',
  'webdataset',
  'folder',
  'array_record',
  'parquet',
  'coco',
)
EMBEDDERS = ('hog', 'huggingface', 'precomputed', 'checkpoint')
LOSSES = ('mlcd', 'mlc', 'softmax', 'mean_softmax', 'sigmoid')
# In the order of the table; evaluate/stage.py has their functions.
TASKS = (
  'linear',
  'knn',
  'few_shot',
  'multi_label',
  'zero_shot',
  'retrieval',
  'finetune',
)

METRICS = (
  'accuracy',
  'mean_per_class',
  'mean_top1_top5',
  'roc_auc',
  'map_11_point',
)


def default() -> ml_collections.ConfigDict:
  """Returns a config with every field; configs/*.py change what they need."""
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      data=_data(),
      embed=_embed(),
      cluster=_cluster(),
      model=_model(),
      loss=_loss(),
      optimizer=_optimizer(),
      train=_train(),
      mesh=_mesh(),
      evaluate=_evaluate(),
      lit=_lit(),
    )
  )


def _data() -> ml_collections.ConfigDict:
  """Where the images are, and how they are cropped."""
  c = ml_collections.ConfigDict()
  c.source = 'embedded'  # One of SOURCES.
  # tfds: the data set's name; coco: the folder with annotations/ and a folder
  # of images a split. Otherwise a path, glob or range such as {00000..00099},
  # local or an fsspec URL; {split} stands for the split.
  c.path = ''
  c.data_dir = ''  # tfds: where it was prepared; '' = TFDS's default.
  c.split = 'train'  # The split that is clustered and trained on.
  # The feature or column, or in tars the suffix, of each part of a record.
  c.image_key = 'image'
  c.label_key = 'label'  # The class, for evaluation only.
  c.caption_key = 'caption'
  c.bad_keys = ''  # Keys to leave out; '' = bad_keys.txt in the workdir.
  c.cache_dir = ''  # Indices and copies; '' = ~/.cache/mlcd_jax.
  c.num_workers = 0  # Decoding processes, above 16 cores; 0 = threads.
  c.max_bad_fraction = 0.01  # Above it, bad images stop the run.
  c.crop_area = (0.7, 1.0)  # Share of the image a training crop keeps.
  c.flip = True  # Mirror half of the training crops.
  return c


def _embed() -> ml_collections.ConfigDict:
  """What embeds them."""
  c = ml_collections.ConfigDict()
  c.embedder = 'hog'  # One of EMBEDDERS.
  # huggingface: any encoder, named as in evaluate.encoder;
  # precomputed: a folder or fsspec URL of embeddings made elsewhere;
  # checkpoint: a workdir, whose encoder embeds.
  c.path = ''
  # precomputed: the array of an .npz ('' = l14_img), or the column of Parquet.
  c.column = ''
  c.text_weight = 0.0  # precomputed: share of the unit text embeddings.
  c.dtype = 'float32'  # Of a model's products; or bfloat16.
  c.image_size = 0  # Pixels; 0 = the embedder's own.
  c.batch_size = 64  # Images per device and call.
  c.shard_rows = 65_536  # Records per embedding file.
  return c


def _cluster() -> ml_collections.ConfigDict:
  """How the embeddings are clustered."""
  c = ml_collections.ConfigDict()
  c.num_centers = 1_000
  c.iterations = 25
  c.tolerance = 0.0  # Stop at a smaller relative gain; 0 = never.
  # (k1, k2): two levels on one machine, k1 coarse centers and k2 in each on
  # average, so k1 * k2 = num_centers; then so many flat iterations. () = flat.
  c.levels = ()
  c.repair_iterations = 2
  c.method = 'auto'  # auto (approximate on CPUs) | exact; see kmeans.fit.
  c.num_labels = 10  # Nearest centers stored for every image.
  c.path = ''  # Another workdir whose clusters are read in place.
  return c


def _model() -> ml_collections.ConfigDict:
  """The encoder that is trained."""
  c = ml_collections.ConfigDict()
  c.variant = 'B/16'
  c.image_size = 224
  c.embedding_dim = 512  # Width of the classifier's input.
  c.pooling = 'class_token'  # class_token | average | attention
  # learned: a table. rope2d: queries and keys turn, for any resolution.
  c.position = 'learned'
  c.activation = 'gelu'  # gelu | quick_gelu | gelu_tanh
  c.dtype = 'bfloat16'  # Of the products; weights stay float32.
  c.remat = 'none'  # Kept for the backward pass: none | dots | full.
  c.scan_layers = False  # Compile one block and loop over it.
  # Weights to start from, named as in evaluate.encoder; '' = random ones.
  c.init_from = ''
  # fresh; kept: as in the workdir model.init_from; centers: the clusters'.
  c.init_classifier = 'fresh'
  c.drop_path = 0.0  # Chance that the last block is skipped.
  return c


def _loss() -> ml_collections.ConfigDict:
  """The classifier and its loss."""
  c = ml_collections.ConfigDict()
  # mlcd (Eq. 5) | mlc (Eq. 4) | softmax | mean_softmax | sigmoid
  c.name = 'mlcd'
  c.num_positives = 8  # Nearest centers used as labels.
  c.label_choice = 'nearest'  # random: anew each step, of all stored.
  c.min_similarity = -1.0  # Labels of a lower cosine are left out.
  c.margin = 0.3  # Subtracted from a positive's cosine, or its radians.
  c.margin_type = 'cosface'  # cosface | arcface
  c.scale = 64.0
  c.sample_rate = 0.1  # Share of all classes drawn as negatives a step.
  c.negatives = 'uniform'  # partial_fc: the batch's positives first.
  c.interclass_filter = 0.0  # Negatives' cosines above count as 0; 0 = off.
  c.chunk_megabytes = 256.0  # Of a device's logits that exist at a time.
  return c


def _optimizer() -> ml_collections.ConfigDict:
  """AdamW, for encoder and classifier."""
  c = ml_collections.ConfigDict()
  c.learning_rate = 1e-3
  c.weight_decay = 0.2
  c.b1 = 0.9
  c.b2 = 0.999
  c.schedule = 'cosine'  # cosine | polynomial | constant
  c.warmup_steps = 0.1  # Steps, or below 1 a fraction of the run.
  c.gradient_clip_norm = 5.0  # 0 = off.
  c.head_learning_rate_multiplier = 1.0  # For the classifier.
  c.head_update = 'dense'  # sparse: only classes with a gradient.
  # (pattern of names, factor) of learning rates; 0 freezes.
  c.multipliers = ()
  return c


def _train() -> ml_collections.ConfigDict:
  """Steps, batches, checkpoints and logs."""
  c = ml_collections.ConfigDict()
  c.steps = 0  # Either steps or epochs.
  c.epochs = 0.0
  c.batch_size = 256  # Images a step, over all devices.
  c.accumulate_steps = 1  # Parts of a batch, one after the other.
  c.ema_decay = 0.0  # Of an average of the encoder, then used; 0 = off.
  c.checkpoint_every_steps = 1_000
  c.checkpoint_every_minutes = 0.0  # Of these as well; 0 = off.
  c.keep_checkpoints = 2  # The last ones.
  c.keep_every_steps = 0  # And for good those of multiples; 0 = none.
  # And the best one by a metric of metrics.jsonl, such as train/loss, as last
  # logged before a checkpoint; '' = none.
  c.keep_best = ''
  c.best_is = 'lowest'  # lowest | highest
  # Batches with a loss or gradient that is not finite, or a spike, left out in
  # this invocation before the run stops.
  c.max_skipped_steps = 0
  # A loss above so many times its moving average is a spike; 0 = off.
  c.max_loss_ratio = 0.0
  c.log_every_steps = 50
  c.wandb_project = ''  # Of Weights & Biases, for the curves; '' = none.
  c.stop_after_steps = 0  # Steps in this invocation; 0 = to the end.
  return c


def _mesh() -> ml_collections.ConfigDict:
  """How the devices are split."""
  c = ml_collections.ConfigDict()
  c.data = -1  # Devices that split batch and points; -1 = the rest.
  c.fsdp = 1  # Devices that also split the weights and the centers.
  c.slices = 1  # Of TPU chips, or hosts of GPUs, that mesh.data spans.
  return c


def _evaluate() -> ml_collections.ConfigDict:
  """Tasks, and data sets to evaluate on."""
  c = ml_collections.ConfigDict()
  c.tasks = ('linear', 'knn', 'few_shot')  # Of TASKS, or all.
  # A workdir or a checkpoint in it, a folder of `convert import`, of
  # transformers or of OpenCLIP, or ORG/NAME[@REVISION], scored without any
  # earlier stage; '' = this run's.
  c.encoder = ''
  c.every_steps = 0  # Of training, into metrics.jsonl; 0 = never.
  c.batch_size = 256  # Images a call, over all devices.
  c.finetune_epochs = 10.0
  c.finetune_batch_size = 128
  c.finetune_learning_rate = 1e-3
  c.finetune_layer_decay = 0.75  # From each layer to the one below.
  # Names of evaluate/datasets.py, or paper, added to the data sets.
  c.named = ()
  c.data_dir = ''  # Where those are; '' = TFDS's folder.
  c.datasets = ml_collections.ConfigDict()
  return c


def _lit() -> ml_collections.ConfigDict:
  """The text tower that zero_shot and retrieval tune to a locked encoder.

  It is trained on the images and captions of `data`; the fields that are not
  here are those of `optimizer`.
  """
  c = ml_collections.ConfigDict()
  c.loss = 'softmax'  # softmax (CLIP) | sigmoid (SigLIP)
  c.steps = 0  # 0 = none: only CLIP's folders, which have one, do texts.
  c.batch_size = 256  # Pairs a step, over all devices.
  c.learning_rate = 5e-4
  c.width = 512
  c.depth = 12
  c.context = 77  # Tokens; longer captions are cut.
  c.dtype = 'bfloat16'  # Of the products; weights stay float32.
  return c


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
  prompts: str = '',
  present_classes: bool = False,
  **data: Any,
) -> None:
  """Adds a labelled data set to evaluate on.

  Args:
    config: to add to.
    name: in results.json.
    train_split: for fitting; '' = zero_shot and retrieval are all that is
      done, and for retrieval it may be without labels.
    test_split: for scoring.
    validation_split: for choosing a penalty; '' = a part of train_split.
    metric: of METRICS, for the linear probe.
    attributes_key: tfds: the feature with several labels an image, such as
      objects/label.
    ignored_key: tfds: a feature with these and further labels; an image is
      left out of the classes that only this one names.
    prompts: for zero_shot, an entry of assets/prompts.json, or FILE:NAME.
    present_classes: zero_shot chooses among the test split's classes only.
    **data: override the fields of config.data.
  """
  dataset = ml_collections.ConfigDict(
    dict(
      train_split=train_split,
      test_split=test_split,
      validation_split=validation_split,
      metric=metric,
      attributes_key=attributes_key,
      ignored_key=ignored_key,
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
  """Returns plain JSON types, tuples as lists."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(v) for v in value]
    return value

  return plain(config.to_dict())


def split_names(names: Sequence[str]) -> list[str]:
  """Returns the names; on the command line a,b comes as one."""
  found = [n.strip() for part in names for n in str(part).split(',')]
  return [name for name in found if name]
