"""The four stages of a run, in order: embed, cluster, train, evaluate.

Each stage keeps a manifest of the config fields and inputs that its files
depend on. A finished stage is skipped and an unfinished one continues. If a
stage was made with another config or from other inputs, it is stale and stops
the run; only the evaluation is repeated instead.
"""

from collections.abc import Sequence
import contextlib
import logging
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax.cluster import coverage
from mlcd_jax.cluster import labels
from mlcd_jax.cluster import stage as cluster_lib
from mlcd_jax.config import check as config_check
from mlcd_jax.config import fields as config_fields
from mlcd_jax.config import mesh as mesh_lib
from mlcd_jax.config import sizes
from mlcd_jax.data import sources
from mlcd_jax.embed import embedders
from mlcd_jax.embed import stage as embed
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import encoders as evaluate_encoders
from mlcd_jax.evaluate import stage as evaluate
from mlcd_jax.evaluate import table
from mlcd_jax.models import resnet
from mlcd_jax.page import writer
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.runtime import terminal
from mlcd_jax.train import stage as train
from mlcd_jax.train import step as step_lib
from mlcd_jax.weights import checkpoint

_log = logging.getLogger(__name__)

STAGES = ('embed', 'cluster', 'train', 'evaluate')

_FOLDERS = {
  'embed': 'embeddings',
  'cluster': 'clusters',
  'train': 'checkpoints',
  'evaluate': 'evaluation',
}


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  stages: Sequence[str] = STAGES,
  *,
  preset: tuple[str, ml_collections.ConfigDict] | None = None,
) -> None:
  """Runs the stages that are due, in order.

  Args:
    config: the config of the run; see `config.default`.
    workdir: the folder that everything is written to.
    stages: the names of the stages to run; the stages before them must be done.
    preset: the name and fields of the preset that the config was made from. The
      report shows what differs from it; without it, from the defaults.

  Raises:
    UserError: the config, the data or the workdir cannot be used.
    RunError: the run failed for a reason outside its config.
    Stopped: a signal stopped the run.
  """
  config_check.check(config)
  config = datasets.with_named(_with_bad_keys(config, workdir))
  if not stages:
    raise errors.UserError('--stages: name some of ' + ', '.join(STAGES))
  for stage in stages:
    if stage not in STAGES:
      raise errors.UserError(
        f'--stages: {stage!r} is unknown; use any of: ' + ', '.join(STAGES)
      )
  mesh = mesh_lib.from_config(config)
  # Mistakes in the last stages are found before the first stage runs for hours.
  models.make(config.model)
  if 'evaluate' in stages:
    evaluate.open_sources(config)
    if config.evaluate.encoder:
      evaluate_encoders.identity(config.evaluate.encoder)
  main = distributed.is_main()
  with files.locked(workdir) if main else contextlib.nullcontext():
    run_ = _Run(config, workdir, mesh, preset)
    run_.check_order(stages)
    if main:
      files.write_json(workdir / 'config.json', config_lib.to_dict(config))
    _log.info('devices: %s', sharding.describe(mesh))
    for stage in STAGES:
      if stage in stages:
        getattr(run_, stage)()
        terminal.clear()
    run_.finish()
  if 'evaluate' in stages and main:
    print(table.table(files.read_json(workdir / 'results.json')))


def fields(config: ml_collections.ConfigDict, stage: str) -> dict[str, Any]:
  """Returns the fields that a stage's files depend on, by dotted name."""
  values = config_fields.of_stage(config_lib.to_dict(config), stage)
  if stage == 'train' and _parts_matter(config):
    values['train.accumulate_steps'] = config.train.accumulate_steps
  return values


def _parts_matter(config: ml_collections.ConfigDict) -> bool:
  """Returns whether accumulation over parts of a batch changes the result.

  It does in three cases. Batch normalisation uses the statistics of a part. In
  drop path each part skips other blocks. `partial_fc` samples negatives around
  the positives of a part.
  """
  return (
    config.model.variant in resnet.VARIANTS
    or config.model.drop_path > 0
    or (config.loss.negatives == 'partial_fc' and config.loss.sample_rate < 1)
  )


class _Run:
  """One invocation, which opens the manifest of each stage and runs it."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    preset: tuple[str, ml_collections.ConfigDict] | None,
  ):
    self._config = config
    self._workdir = workdir
    self._mesh = mesh
    # With cluster.path the embeddings and clusters of another run are read in
    # place.
    self._shared = paths.local(config.cluster.path or workdir)
    if self._is_shared:
      self._check_shared()
    self._check_made()
    self._folders = {stage: self._folder(stage) for stage in STAGES}
    self._page = writer.Page(
      config, workdir, folders=self._folders, mesh=mesh, preset=preset
    )

  def check_order(self, stages: Sequence[str]) -> None:
    """Raises a UserError if a stage before the ones to run is not done."""
    needing = set(stages)
    if self._config.evaluate.encoder:
      needing -= {'evaluate'}  # An encoder elsewhere needs no other stage.
    last = max(map(STAGES.index, needing), default=0)
    missing = [
      s for s in STAGES[:last] if s not in stages and not self._is_made(s)
    ]
    if missing:
      needed = [s for s in STAGES if s in (*missing, *stages)]
      raise errors.UserError(
        f'--stages={",".join(stages)}: {" and ".join(missing)} must be done '
        f'before, and not all is in {self._workdir}; use --stages='
        f'{",".join(needed)}, or the --workdir where it is'
      )

  def finish(self) -> None:
    """Writes the report page and logs where the results are."""
    if distributed.is_main():
      self._page.finish()
      places = manifests.places(self._workdir, self._folders)
      _log.info('all lies in\n%s', places)

  @property
  def _is_shared(self) -> bool:
    return bool(self._config.cluster.path)

  def embed(self) -> None:
    """Embeds the images into embeddings/."""
    if self._is_shared:
      _log.info('embed: read from %s', self._shared)
      return
    manifest = self._open('embed', {})
    if not manifest.complete:
      with self._page.stage('embed'):
        embed.run(self._config, manifest)

  def cluster(self) -> None:
    """Clusters embeddings/ into clusters/."""
    if self._is_shared:
      _log.info('cluster: read from %s', self._shared)
      return
    made = self._done('embed')
    if not self._done('cluster'):
      cluster_lib.check(self._config, made)
    manifest = self._open('cluster', {'embeddings': made.fingerprint()})
    # Finished labels can still be measured by attributes that are named later.
    if not manifest.complete or coverage.is_due(self._config, manifest.folder):
      with self._page.stage('cluster'):
        cluster_lib.run(
          self._config,
          manifest,
          embedded=made,
          mesh=self._mesh,
        )

  def train(self) -> None:
    """Trains on the images and the labels of clusters/ into checkpoints/."""
    made = self._done('cluster')
    manifest = self._open('train', {'clusters': made.fingerprint()})
    if not manifest.complete:
      with self._page.stage('train'):
        train.run(
          self._config,
          manifest,
          workdir=self._workdir,
          embedded=self._done('embed'),
          labels=labels.Labels(
            made, min_similarity=self._config.loss.min_similarity
          ),
          mesh=self._mesh,
          evaluate=evaluate.inside_training(self._config)
          if self._config.evaluate.every_steps
          else None,
          on_log=self._page.refresh,
        )

  def evaluate(self) -> None:
    """Evaluates checkpoints/ or evaluate.encoder into results.json."""
    path = self._config.evaluate.encoder
    if path:
      manifest = self._open_evaluation(evaluate_encoders.identity(path))
      if not manifest.complete:
        self._score(manifest, evaluate.of_path(path, self._mesh))
      return
    checkpoints = self._workdir / _FOLDERS['train']
    step = distributed.decide(
      'evaluated step', lambda: checkpoint.latest_step(checkpoints)
    )
    trained = manifests.load(checkpoints)
    manifest = self._open_evaluation(
      {'step': step, 'train': trained and trained.fingerprint()}
    )
    if manifest.complete:
      return
    source = sources.make(self._config.data)
    program = step_lib.Program(
      config=self._config,
      num_classes=self._done('cluster').result['num_centers'],
      steps=sizes.num_steps(self._config, len(source)),
      mesh=self._mesh,
    )
    embedder = embedders.load_embedder(
      self._done('embed'), batch_size=self._config.embed.batch_size
    )
    scored = evaluate.of_run(program, checkpoints, step, embedder)
    self._page.show_patches(scored['trained'], source)
    self._score(manifest, scored)

  def _score(self, manifest, scored) -> None:
    """Runs the evaluation of `scored`, the encoders by name in results.json."""
    with self._page.stage('evaluate'):
      evaluate.run(
        self._config,
        manifest,
        workdir=self._workdir,
        scored=scored,
        mesh=self._mesh,
      )

  def _folder(self, stage: str) -> pathlib.Path:
    """Returns the folder of a stage; embed and cluster may be shared."""
    shared = stage in ('embed', 'cluster')
    return (self._shared if shared else self._workdir) / _FOLDERS[stage]

  def _fields(self, stage: str) -> dict[str, Any]:
    return fields(self._config, stage)

  def _open(self, stage: str, inputs: dict[str, Any]) -> manifests.Manifest:
    """Returns the checked manifest of a stage, or a new one."""
    manifest = manifests.open_for(
      stage, self._folder(stage), config=self._fields(stage), inputs=inputs
    )
    _log.info(
      '%s: %s',
      stage,
      f'done, reused from {manifest.folder}'
      if manifest.complete
      else 'running',
    )
    return manifest

  def _open_evaluation(self, inputs: dict[str, Any]) -> manifests.Manifest:
    """Returns the manifest of the evaluation.

    Unlike `_open`, it starts anew if the config or the encoder differs or if
    the results have changed.
    """
    folder = self._folder('evaluate')
    config = self._fields('evaluate')
    found = manifests.load(folder)
    if found and found.complete:
      same = (found.config, found.inputs) == (config, inputs)
      if same and distributed.decide(
        'results',
        lambda: files.unchanged(self._workdir, found.result['sha256']),
      ):
        _log.info('evaluate: done')
        return found
      _log.info('evaluate: scored before, now again')
    manifest = manifests.Manifest(
      'evaluate', folder, config=config, inputs=inputs
    )
    manifest.save()
    return manifest

  def _done(self, stage: str) -> manifests.Manifest:
    """Returns the manifest of a stage; None if the stage has not begun."""
    return manifests.load(self._folder(stage))

  def _is_made(self, stage: str) -> bool:
    """Returns whether a stage has what the later stages read.

    For training that is any checkpoint, so that an unfinished run can be
    evaluated.
    """
    if stage == 'train':
      folder = self._folder(stage)
      return distributed.decide(
        'trained', lambda: checkpoint.latest_step(folder) is not None
      )
    manifest = self._done(stage)
    return manifest is not None and manifest.complete

  def _check_made(self) -> None:
    """Checks that all begun stages fit the config, even those not run now.

    Raises:
      UserError: a stage was made with another config.
    """
    for stage in ('embed', 'cluster', 'train'):
      if self._is_shared and stage != 'train':
        continue  # `_check_shared` checks these.
      manifest = manifests.load(self._folder(stage))
      if manifest:
        manifests.check_same(
          manifest.config, self._fields(stage), manifest.folder
        )

  def _check_shared(self) -> None:
    """Checks that the shared clusters are complete and fit the config.

    Raises:
      UserError: they are unfinished, stale or made with other fields.
    """
    for stage in ('embed', 'cluster'):
      if not self._is_made(stage):
        raise errors.UserError(
          f'{self._folder(stage)}: the {stage} stage is not done; run it there '
          f'(cluster.path={self._shared}), or unset cluster.path'
        )
    embedded, clustered = self._done('embed'), self._done('cluster')
    if clustered.inputs['embeddings'] != embedded.fingerprint():
      raise errors.UserError(
        f'cluster.path={self._shared}: its clusters were made from other '
        'embeddings than lie there now; cluster again'
      )
    fields = self._fields('cluster')  # What training sees must match.
    names = ['cluster.num_labels', 'cluster.fit_on', 'cluster.rule']
    if self._config.cluster.num_centers:  # With 0 this run takes what is there.
      names.append('cluster.num_centers')
    manifests.check_same(
      clustered.config
      | {'cluster.num_centers': clustered.result['num_centers']},
      {name: fields[name] for name in names},
      clustered.folder,
    )


def _with_bad_keys(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ml_collections.ConfigDict:
  """Returns the config with the workdir's bad_keys.txt, if check_data wrote it.

  A data.bad_keys that the user set takes precedence.
  """
  found = workdir / 'bad_keys.txt'
  if config.data.bad_keys or not distributed.decide('bad keys', found.exists):
    return config
  config = config.copy_and_resolve_references()
  config.data.bad_keys = str(found)
  return config
