"""Features that tasks are tested on."""

import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.evaluate import features


def draw(num_rows, dim=12, num_classes=4, noise=1.5, seed=0):
  """Rows around one mean a class, and their classes."""
  rng = np.random.default_rng(seed)
  means = np.random.default_rng(99).normal(size=(num_classes, dim))
  labels = rng.integers(0, num_classes, num_rows).astype(np.int32)
  rows = means[labels] + noise * rng.normal(size=(num_rows, dim))
  return rows.astype(np.float32), labels


def data(train, test, num_classes=4, **others):
  """What a task gets, of pairs of rows and labels."""
  return features.Data(
    features.Split(*train),
    features.Split(*test),
    num_classes,
    sharding.make_mesh(),
    **others,
  )


def run(task, *args, **kwargs):
  """Scores of a task on `data`, with the default config."""
  return task.run(data(*args, **kwargs), config_lib.default())
