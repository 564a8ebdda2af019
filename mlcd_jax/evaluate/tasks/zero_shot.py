"""Zero-shot classification: the class whose sentences are nearest.

As CLIP (Radford et al. 2021, section 3.1.4): a class's sentences are embedded,
and their mean is its weight.
"""

import ml_collections
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import unit
from mlcd_jax.data import sources
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import lit
from mlcd_jax.evaluate import prompts


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns test accuracy; nothing without `prompts` or a text tower.

  Where the data set has `present_classes`, only classes with an image in the
  test split can be predicted, as ImageNet-A and -R are scored.
  """
  towers = data.config.get('prompts') and lit.towers(data, config)
  if not towers:
    return {}
  sentences = _sentences(data.config, data.test.source, data.num_classes)
  classes = np.arange(data.num_classes)
  if data.config.get('present_classes'):
    classes = np.unique(data.test.labels)
  weights = class_weights(towers, [sentences[c] for c in classes])
  nearest, _ = kmeans.nearest_centers(
    towers.images(data.test.features), weights, 1, mesh=data.mesh
  )
  right = classes[nearest[:, 0]] == data.test.labels
  scores = intervals.bootstrap(right.astype(np.float64), seed=config.seed)
  return {f'accuracy{k}': v for k, v in scores.items()}


def check(
  dataset: ml_collections.ConfigDict,
  source: sources.Source,
  num_classes: int,
  field: str,
) -> None:
  """Raises UserError if the data set's prompts do not fit it.

  Args:
    dataset: its fields.
    source: its test split.
    num_classes: of all splits.
    field: the name of the fields.
  """
  if dataset.prompts:
    _sentences(dataset, source, num_classes, field)


def _sentences(dataset, source, num_classes, field='evaluate.datasets'):
  return prompts.sentences(
    dataset.prompts, source.class_names, num_classes, field=f'{field}.prompts'
  )


def class_weights(towers: lit.Towers, sentences: list[list[str]]) -> np.ndarray:
  """Unit rows [C, E]: the mean of each class's embedded sentences."""
  rows = towers.texts([text for found in sentences for text in found])
  rows = rows.reshape(len(sentences), len(sentences[0]), -1)
  return unit.unit_rows(rows.mean(axis=1))
