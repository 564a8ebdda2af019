"""Which encoders are scored, on what; writes results.json."""

import pathlib

import ml_collections

from mlcd_jax import checkpoint
from mlcd_jax import distributed
from mlcd_jax import embed
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import manifests
from mlcd_jax import train_step
from mlcd_jax.data import sources
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import few_shot
from mlcd_jax.evaluate import knn
from mlcd_jax.evaluate import linear

_TASKS = {'linear': linear.run, 'knn': knn.run, 'few_shot': few_shot.run}


def run(
  config: ml_collections.ConfigDict,
  manifest: manifests.Manifest,
  *,
  workdir: pathlib.Path,
  program: train_step.Program,
  checkpoints: pathlib.Path,
  step: int,
  embedder: embed.Embedder | None,
) -> None:
  """Scores the trained encoder and the baselines on every data set."""
  encoders = _encoders(config, program, checkpoints, step, embedder)
  results = {}
  for name, (train_source, test_source) in open_sources(config).items():
    for encoder_name, encoder in encoders.items():
      extracted = _extract(
        encoder,
        train_source,
        test_source,
        batch_size=config.evaluate.batch_size,
        name=f'evaluate {name} {encoder_name}',
      )
      for task in config.evaluate.tasks:
        scores = _TASKS[task](extracted, seed=config.seed)
        for metric, value in scores.items():
          results[f'{encoder_name}/{name}/{task}/{metric}'] = value
  path = workdir / 'results.json'
  if distributed.is_main():
    files.write_json(path, results)
  distributed.barrier('results')
  manifest.finish(sha256={path.name: files.sha256(path)})


def open_sources(
  config: ml_collections.ConfigDict,
) -> dict[str, tuple[sources.Source, sources.Source]]:
  """Opens the train and test split of every data set to evaluate on.

  Raises:
    UserError: one of them is not there, or has no labels.
  """
  opened = {}
  for name, dataset in config.evaluate.datasets.items():
    try:
      opened[name] = (
        sources.make(dataset, dataset.train_split),
        sources.make(dataset, dataset.test_split),
      )
    except errors.UserError as e:
      raise errors.UserError(f'evaluate.datasets.{name}: {e}') from e
    if not opened[name][0].num_classes:
      raise errors.UserError(
        f'evaluate.datasets.{name}.label_key={dataset.label_key}: no class '
        'labels there; name the feature that has them'
      )
  return opened


def _encoders(
  config: ml_collections.ConfigDict,
  program: train_step.Program,
  checkpoints: pathlib.Path,
  step: int,
  embedder: embed.Embedder | None,
) -> dict[str, features.Encoder]:
  """The encoders by the name they have in results.json."""
  checkpointer = checkpoint.Checkpointer(checkpoints)
  state = checkpointer.restore(step, program.abstract_state)
  checkpointer.close()
  size = config.model.image_size

  def model(params):
    return features.from_model(program.model, params, size, program.mesh)

  encoders = {
    'trained': model(state.encoder),
    'random': model(program.init_encoder()),
    'raw': features.raw_pixels(),
  }
  if embedder:
    encoders['embedder'] = features.from_embedder(embedder)
  return encoders


def _extract(
  encoder: features.Encoder,
  train_source: sources.Source,
  test_source: sources.Source,
  *,
  batch_size: int,
  name: str,
) -> features.Features:
  x_train, y_train = features.extract(
    encoder, train_source, batch_size=batch_size, name=f'{name} train'
  )
  x_test, y_test = features.extract(
    encoder, test_source, batch_size=batch_size, name=f'{name} test'
  )
  return features.Features(
    x_train, y_train, x_test, y_test, train_source.num_classes
  )
