"""Which encoders are scored, on what, in which tasks; writes results.json."""

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

# Tasks that need one class an image.
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
  """Scores encoders on every data set.

  Args:
    config: of the run.
    manifest: of this stage; the features are kept in its folder.
    workdir: where results.json goes.
    scored: by the name they have in results.json.
    mesh: of all devices.
  """
  datasets = open_sources(config)
  results = {}
  for name, encoder in scored.items():
    found = score(
      config, encoder, datasets, name=name, mesh=mesh, folder=manifest.folder
    )
    results |= {f'{name}/{metric}': value for metric, value in found.items()}
  path = workdir / 'results.json'
  if distributed.is_main():
    files.write_json(path, results)
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
    config: of the run.
    encoder: to be scored.
    datasets: of `open_sources`.
    name: of the encoder, in progress lines and names of files.
    mesh: of all devices.
    folder: where features are kept; None keeps none.

  Returns:
    '<data set>/<task>/<metric>' -> value, None where undefined.
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
        defined = value is not None and math.isfinite(value)
        results[f'{dataset}/{task}/{metric}'] = value if defined else None
  return results


def _applies(task: str, data: features.Data) -> bool:
  """Whether the data set has what a task needs."""
  if data.train is None:
    return task in labelled.UNFITTED
  return bool(data.num_classes) or task not in _OF_CLASSES


def inside_training(
  config: ml_collections.ConfigDict,
) -> Callable[[encoders.Trained, Any], dict[str, float | None]]:
  """Makes what training calls every `evaluate.every_steps`.

  Returns:
    (program, parameters of the encoder) -> names in metrics.jsonl and values.
  """
  datasets = open_sources(config)

  def evaluate(program, params):
    encoder = encoders.from_model(program.model, params, program.mesh)
    found = score(config, encoder, datasets, name='trained', mesh=program.mesh)
    return {f'evaluate/{name}': value for name, value in found.items()}

  return evaluate


def open_sources(config: ml_collections.ConfigDict) -> Datasets:
  """Opens the splits of every data set to evaluate on.

  Returns:
    data set -> train, test, and validation where it is named -> source.

  Raises:
    UserError: one of them is not there, or has no labels.
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
  """A run's encoder and its baselines, by their names in results.json."""
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
  """The encoder `evaluate.encoder` names, and raw pixels beside it."""
  return {
    'trained': encoders.load(path, mesh),
    'raw': encoders.raw_pixels(),
  }
