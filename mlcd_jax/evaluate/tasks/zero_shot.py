"""Zero-shot classification by the class with the nearest sentences.

As in CLIP (Radford et al. 2021, section 3.1.4), the weight of a class is the
mean of its embedded sentences.

Shapes: C classes, E joint embedding.
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
  """Returns the test accuracy with its interval.

  It returns {} if the data set has no `prompts` or the encoder no text tower.
  With `present_classes` only classes that have an image in the test split can
  be predicted, as ImageNet-A and ImageNet-R are scored.
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
  """Raises UserError if a data set and its prompts do not fit each other.

  Args:
    dataset: the fields of the data set in the config.
    source: the test split.
    num_classes: the number of classes over all splits.
    field: the name of the data set's section in the config, for errors.
  """
  if dataset.prompts:
    _sentences(dataset, source, num_classes, field)


def _sentences(dataset, source, num_classes, field='evaluate.datasets'):
  """Returns the sentences of every class; see `prompts.sentences`."""
  return prompts.sentences(
    dataset.prompts, source.class_names, num_classes, field=f'{field}.prompts'
  )


def class_weights(towers: lit.Towers, sentences: list[list[str]]) -> np.ndarray:
  """Returns the mean of each class's embedded sentences as unit rows [C, E].

  Args:
    towers: the towers, whose `texts` embeds the sentences.
    sentences: the sentences of every class, the same number for each.
  """
  rows = towers.texts([text for found in sentences for text in found])
  # Every class has the same number of sentences.
  rows = rows.reshape(len(sentences), len(sentences[0]), -1)
  return unit.unit_rows(rows.mean(axis=1))
