"""The evaluate stage: scores encoders on data sets and writes results.json."""

from collections.abc import Callable
from collections.abc import Mapping
import math
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax.data import sources
from mlcd_jax.embed import embedders
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import labelled
from mlcd_jax.evaluate import lit
from mlcd_jax.evaluate import tasks as tasks_lib
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import checkpoint

# The tasks that need one class per image.
_OF_CLASSES = ('knn', 'few_shot', 'finetune')

_SPLITS = ('train', 'validation', 'test')

Datasets = Mapping[str, Mapping[str, sources.Source]]


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  workdir: pathlib.Path,
  scored: Mapping[str, encoders.Encoder],
  mesh: Mesh,
) -> None:
  """Scores encoders on every data set and writes results.json.

  Args:
    config: the config of the run.
    manifest: the manifest of this stage, which is finished at the end. The
      features are cached in its folder.
    workdir: the folder for results.json.
    scored: the encoders by their names in results.json. Those that
      evaluate.baselines leaves out are not scored.
    mesh: the mesh of all devices.
  """
  datasets = open_sources(config)
  wanted = 'trained', *config_lib.split_names(config.evaluate.baselines)
  results = {}
  for name, encoder in scored.items():
    if name not in wanted:
      continue
    found = score(
      config, encoder, datasets, name=name, mesh=mesh, folder=manifest.folder
    )
    results |= {f'{name}/{metric}': value for metric, value in found.items()}
  path = workdir / 'results.json'
  if distributed.is_main():
    files.write_json(path, results)
  # All processes read the file for its digest.
  distributed.barrier('results')
  manifest.finish(sha256={path.name: files.sha256(path)})


def score(
  config: ml_collections.ConfigDict,
  encoder: encoders.Encoder,
  datasets: Datasets,
  *,
  name: str,
  mesh: Mesh,
  folder: pathlib.Path | None = None,
) -> dict[str, float | None]:
  """Scores one encoder in every task on every data set.

  Args:
    config: the config of the run.
    encoder: the encoder to score.
    datasets: the sources from `open_sources`.
    name: the name of the encoder in progress lines and file names.
    mesh: the mesh of all devices.
    folder: the folder to cache features in; None caches nothing.

  Returns:
    The values by '<data set>/<task>/<metric>'; None if a value is undefined.
  """
  extract = features.Extractor(
    encoder, name, config.evaluate.batch_size, folder
  )
  results, shared = {}, {}
  for dataset, splits in datasets.items():
    found = {
      split: extract(source, f'{dataset} {split}')
      for split, source in splits.items()
    }
    data = features.Data(
      **({'train': None} | found),
      num_classes=labelled.num_classes(splits),
      mesh=mesh,
      encoder=encoder,
      extract=extract,
      config=config.evaluate.datasets[dataset],
      shared=shared,
    )
    for task in config_lib.tasks(config):
      if not _applies(task, data):
        continue
      given = labelled.keep(task, data, dataset)
      for metric, value in tasks_lib.RUN[task](given, config).items():
        # JSON has no NaN; an undefined value becomes null.
        defined = value is not None and math.isfinite(value)
        results[f'{dataset}/{task}/{metric}'] = value if defined else None
  return results


def _applies(task: str, data: features.Data) -> bool:
  """Returns whether a data set has the split and the classes a task needs."""
  if data.train is None:
    return task in labelled.UNFITTED
  return bool(data.num_classes) or task not in _OF_CLASSES


def inside_training(
  config: ml_collections.ConfigDict,
) -> Callable[[encoders.Trained, Any], dict[str, float | None]]:
  """Makes the function that training calls every `evaluate.every_steps`.

  Returns:
    A function (program, parameters of the encoder) -> values, by their names
    in metrics.jsonl.
  """
  datasets = open_sources(config)

  def evaluate(program, params):
    encoder = encoders.from_model(program.model, params, program.mesh)
    found = score(config, encoder, datasets, name='trained', mesh=program.mesh)
    return {f'evaluate/{name}': value for name, value in found.items()}

  return evaluate


def open_sources(config: ml_collections.ConfigDict) -> Datasets:
  """Opens and checks the splits of every data set to evaluate on.

  Returns:
    The sources, by data set and by split. The splits are those that the config
    names: test, and possibly train and validation.

  Raises:
    UserError: a data set is missing, lacks labels that a task needs, or does
      not fit its prompts; or there are no captions to tune a text tower on.
  """
  tasks = config_lib.tasks(config)
  if config.lit.steps and set(labelled.UNFITTED) & set(tasks):
    lit.check(config)
  opened = {}
  for name, dataset in config.evaluate.datasets.items():
    field = f'evaluate.datasets.{name}'
    try:
      opened[name] = {
        split: sources.make(dataset, dataset[f'{split}_split'])
        for split in _SPLITS
        if dataset.get(f'{split}_split')
      }
    except errors.UserError as e:
      raise errors.UserError(
        f'{field}: {e}{datasets.way_out(name, config)}'
      ) from e
    opened[name] = sources.number_classes(
      opened[name],
      field=field,
      label_key=dataset.label_key,
      # Prompts are listed by class number, so the numbers must stay.
      keep=bool(dataset.prompts),
    )
    datasets.check_sizes(
      name, config, {split: len(s) for split, s in opened[name].items()}
    )
    labelled.check(name, config, opened[name])
  return opened


def of_run(
  program: encoders.Trained,
  checkpoints: pathlib.Path,
  step: int,
  embedder: embedders.Embedder | None,
) -> dict[str, encoders.Encoder]:
  """Returns a run's encoder and its baselines, by their names in results.json.

  Args:
    program: the train program of the run.
    checkpoints: the folder of the run's checkpoints.
    step: the step of the checkpoint to score.
    embedder: the embedder whose embeddings were clustered; None if they were
      made elsewhere.
  """
  checkpointer = checkpoint.Checkpointer(checkpoints)
  state = checkpointer.restore(step, program.abstract_state)
  checkpointer.close()

  def model(params):
    return encoders.from_model(program.model, params, program.mesh)

  found = {'trained': model(state.encoder)}
  if embedder:
    found['embedder'] = encoders.from_embedder(embedder)
  return found | {
    'random': model(program.init_encoder()),
    'raw': encoders.raw_pixels(),
  }


def of_path(path: str, mesh: Mesh) -> dict[str, encoders.Encoder]:
  """Returns the encoder at `evaluate.encoder` and the raw-pixel baseline."""
  return {
    'trained': encoders.load(path, mesh),
    'raw': encoders.raw_pixels(),
  }
