"""Zero-shot classification: the class whose sentences are nearest.

As CLIP (Radford et al. 2021, section 3.1.4): a class's sentences are embedded,
and their mean is its weight.
"""

import ml_collections
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import points
from mlcd_jax.evaluate import features as features_lib
from mlcd_jax.evaluate import lit
from mlcd_jax.evaluate import prompts
from mlcd_jax.evaluate import statistics


def run(
  data: features_lib.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns test accuracy; nothing for data sets without `prompts`.

  Where the data set has `present_classes`, only classes with an image in the
  test split can be predicted, as ImageNet-A and -R are scored.
  """
  if not data.config.get('prompts'):
    return {}
  sentences = prompts.sentences(
    data.config.prompts,
    data.test.source.class_names,
    data.num_classes,
    field='prompts',
  )
  classes = np.arange(data.num_classes)
  if data.config.get('present_classes'):
    classes = np.unique(data.test.labels)
  towers = lit.towers(data, config)
  weights = class_weights(towers, [sentences[c] for c in classes])
  nearest, _ = kmeans.nearest_centers(
    towers.images(data.test.features), weights, 1, mesh=data.mesh
  )
  right = classes[nearest[:, 0]] == data.test.labels
  scores = statistics.bootstrap(right.astype(np.float64), seed=config.seed)
  return {f'accuracy{k}': v for k, v in scores.items()}


def class_weights(towers: lit.Towers, sentences: list[list[str]]) -> np.ndarray:
  """Unit rows [C, E]: the mean of each class's embedded sentences."""
  rows = towers.texts([text for found in sentences for text in found])
  rows = rows.reshape(len(sentences), len(sentences[0]), -1)
  return points.unit_rows(rows.mean(axis=1))
