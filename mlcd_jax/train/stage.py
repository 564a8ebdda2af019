"""The train stage: opens data and labels, makes the state, runs the loop."""

from collections.abc import Callable
import contextlib
import functools
import logging
import pathlib

from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax.cluster import labels as labels_lib
from mlcd_jax.config import sizes
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import matching
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import signals
from mlcd_jax.train import init
from mlcd_jax.train import loop
from mlcd_jax.train import profile
from mlcd_jax.train import step as step_lib
from mlcd_jax.train import summary
from mlcd_jax.weights import checkpoint
from mlcd_jax.weights import hub

_log = logging.getLogger(__name__)


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  workdir: pathlib.Path,
  embedded: manifests.Manifest,
  labels: labels_lib.Labels,
  mesh: Mesh,
  evaluate: loop.Evaluate | None = None,
  on_log: Callable[[], None] = lambda: None,
) -> None:
  """Trains to the last step, or for train.stop_after_steps steps.

  Args:
    config: the config of the run.
    manifest: the manifest of this stage.
    workdir: the folder that receives the metrics.
    embedded: the manifest of the embed stage, which made the labelled rows.
    labels: the labels of those rows.
    mesh: the mesh of all devices.
    evaluate: a function that scores the encoder every evaluate.every_steps;
      None = never.
    on_log: a function to call after metrics were written.

  Raises:
    UserError: the images do not match the labels, the mesh has too many
      devices for the classes, or model.init_... names unfit weights.
    RunError: the loss or the gradient is not finite or the loss is a spike,
      in more steps than train.max_skipped_steps allows.
    Stopped: a signal stopped training, after the state was saved.
  """
  source = sources.make(config.data)
  sources.check_same(source, 'data.path')
  manifests.check_bad_keys(config.data.bad_keys, manifest)
  label_rows = _label_rows(config, source, embedded)
  # Whoever reads the checkpoint needs it; the config may leave it open.
  manifest.notes['num_centers'] = labels.num_classes
  _pin_start(config, manifest)
  program = step_lib.Program(
    config=config,
    num_classes=labels.num_classes,
    steps=sizes.num_steps(config, len(source)),
    mesh=mesh,
  )
  _log.info(
    'train: %d steps of %d images, %.3g epochs of %d images',
    program.steps,
    config.train.batch_size,
    program.steps * config.train.batch_size / len(source),
    len(source),
  )
  _log.info('train: parameters\n%s', summary.parameters(program))
  checkpointer = _checkpointer(config, manifest.folder)
  state, first = _restore_or_init(program, checkpointer, clusters=labels.folder)
  last = program.steps
  if config.train.stop_after_steps:
    last = min(last, first + config.train.stop_after_steps)
  log = loop.Log(
    program,
    workdir,
    first,
    keys=functools.partial(_keys, config, source),
    on_log=on_log,
  )
  with (
    contextlib.closing(checkpointer),
    contextlib.closing(log),
    contextlib.closing(
      _batches(config, source, label_rows, labels, first, mesh)
    ) as batches,
    signals.noted() as interrupted,
    profile.Trace(
      tuple(config.train.profile_steps), workdir / 'tensorboard'
    ) as trace,
  ):
    loop.run(
      program,
      state,
      batches,
      last=last,
      checkpointer=checkpointer,
      log=log,
      trace=trace,
      interrupted=interrupted,
      evaluate=evaluate,
    )
  # A stage stopped by train.stop_after_steps stays open for the next run.
  if last == program.steps:
    manifest.finish(step=last)


def _pin_start(
  config: ml_collections.ConfigDict, manifest: manifests.Manifest
) -> None:
  """Saves the manifest with the weights that `model.init_from` names.

  Only the first invocation records their commit, because the weights behind a
  name may change later.
  """
  if config.model.init_from and 'init_from' not in manifest.notes:
    path = hub.pinned(config.model.init_from, 'model.init_from')
    manifest.notes['init_from'] = path
  manifest.save()


def _checkpointer(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> checkpoint.Checkpointer:
  """Opens the checkpoints in a folder with the rules of the `train` fields."""
  return checkpoint.Checkpointer(
    folder,
    keep=config.train.keep_checkpoints,
    keep_every_steps=config.train.keep_every_steps,
    keep_best=config.train.keep_best,
    best_is=config.train.best_is,
  )


def _batches(config, source, label_rows, labels, first, mesh):
  """Returns the batches after step `first`, which are loaded in advance.

  Args:
    config: the config of the run.
    source: the images to train on.
    label_rows: the row of each record among the labels, from `_label_rows`.
    labels: the labels.
    first: the number of steps taken before this invocation.
    mesh: the mesh of all devices, onto which the batches are put.
  """
  own_rows = pipelines.train_batches(
    source,
    label_rows,
    labels,
    num_positives=step_lib.num_labels(config),
    batch_size=config.train.batch_size,
    image_size=config.model.image_size,
    crop_area=tuple(config.data.crop_area),
    flip=config.data.flip,
    seed=config.seed,
    start_step=first,
    num_workers=config.data.num_workers,
    max_bad_fraction=config.data.max_bad_fraction,
    rows=sharding.own_rows(mesh, config.train.batch_size),
  )
  put = functools.partial(sharding.put_batch, mesh)
  return pipelines.Prefetched(own_rows, put)


def _label_rows(
  config: ml_collections.ConfigDict,
  source: sources.Source,
  embedded: manifests.Manifest,
) -> np.ndarray:
  """Matches records to labels by key.

  Args:
    config: the config of the run.
    source: the images to train on.
    embedded: the manifest of the embed stage, whose keys the labels have.

  Returns:
    Int [N], the row of each record among the labels; -1 if it has none.

  Raises:
    UserError: more than data.max_bad_fraction of the records have no label.
  """
  keys = source.keys()
  label_keys = shards.open_made(embedded).keys()
  rows = matching.join(keys, label_keys, matching.root_of(config.data.path))
  missing = np.flatnonzero(rows < 0)
  is_unused = np.ones(len(label_keys), bool)
  is_unused[rows[rows >= 0]] = False
  unused = np.sum(is_unused)
  if len(missing) > config.data.max_bad_fraction * len(keys):
    others = label_keys[np.flatnonzero(is_unused)[:3]]
    raise errors.UserError(
      f'data.path: {len(missing)} of {len(keys)} images have no labels '
      f'(such as {_named(keys[missing[:3]])}), more than data.max_bad_fraction='
      f'{config.data.max_bad_fraction} allows; {unused} labels have no image '
      f'(such as {_named(others)}). They were made from other images, or these '
      'have other keys there: embed the images of data.path, or give both the '
      'same keys'
    )
  if len(missing) or unused:
    # Of label rows with the same key only the first finds its image.
    repeated = np.isin(label_keys[is_unused], label_keys[rows[rows >= 0]])
    _log.warning(
      'train: %d of %d images have no labels and weigh nothing; %d of %d '
      'label rows have no image%s',
      len(missing),
      len(keys),
      unused,
      len(label_keys),
      f', {repeated.sum()} of them since an earlier row has the same key'
      * bool(repeated.any()),
    )
  return rows


def _named(keys: np.ndarray) -> str:
  """Returns some keys as text, separated by commas."""
  return ', '.join(map(keys_lib.text, keys.tolist()))


def _keys(
  config: ml_collections.ConfigDict, source: sources.Source, step: int
) -> list[str]:
  """Returns the keys of the batch of a step; steps count from 1."""
  first = (step - 1) * config.train.batch_size
  places = range(first, first + config.train.batch_size)
  keys = source.keys()
  # The order of records is a function of the seed, so the batch is not needed.
  return [
    keys[pipelines.record_at(place, len(source), config.seed)].decode(
      'utf-8', 'replace'
    )
    for place in places
  ]


def _restore_or_init(
  program: step_lib.Program,
  checkpointer: checkpoint.Checkpointer,
  *,
  clusters: pathlib.Path,
) -> tuple[step_lib.TrainState, int]:
  """Restores the latest checkpoint, or makes the state of step 0.

  Args:
    program: the program of the run.
    checkpointer: the checkpointer of the run.
    clusters: the folder of the clusters that serve as classes.

  Returns:
    The state and its step.
  """
  restored = checkpointer.restore_latest(program.abstract_state)
  if restored is None:
    return init.make(program, clusters=clusters), 0
  _log.info('train: continuing from step %d', restored[1])
  return restored
