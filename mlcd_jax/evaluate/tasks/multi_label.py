"""Multi-label classification by a one-vs-rest linear probe.

mAP, CF1 and OF1 are those of ML-GCN (Chen et al. 2019, section 4.1): an
attribute is predicted if its probability is above 0.5. For `exact_set` and the
recall of objects the number n of an image's attributes is known, and those with
the n highest scores are predicted.
"""

import functools

import ml_collections
import numpy as np

from mlcd_jax.data import transforms
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import scores
from mlcd_jax.evaluate.tasks import linear


def run(
  data: features.Data, config: ml_collections.ConfigDict
) -> dict[str, float]:
  """Returns the metrics on the test split, with their intervals.

  They are mAP, CF1, OF1, exact_set and, if the data set has boxes, the recall
  of objects: recall_small, _medium and _large by size, and recall_of_1, _of_2,
  _of_3_to_4 and _of_5_up by the number of objects in the image. A group without
  an object has no recall.

  The dict also has the values of `linear.predict` that describe the fit. It is
  empty if the images do not have several labels.
  """
  predicted = predict(data, config.seed)
  if predicted is None:
    return {}
  found, test_y, fitted = predicted
  out = dict(fitted)
  for name, metric in {
    'mAP': scores.mean_average_precision,
    'CF1': functools.partial(_f1, per_class=True),
    'OF1': functools.partial(_f1, per_class=False),
  }.items():
    values = intervals.bootstrap_of(metric, found, test_y, seed=config.seed)
    out |= {f'{name}{k}': v for k, v in values.items()}
  exact = scores.exact_set(found, test_y)
  exact = exact[np.isfinite(exact)]
  values = {}
  if len(exact):
    values['exact_set'] = intervals.bootstrap(exact, seed=config.seed)
  if data.config.get('boxes_key'):
    values |= _recall(found, test_y, data.test, config.seed)
  for name, interval in values.items():
    out |= {f'{name}{k}': v for k, v in interval.items()}
  return out


def predict(
  data: features.Data, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, float]] | None:
  """Fits the probe and scores the test rows.

  Args:
    data: the data of the task.
    seed: see `linear.targets`.

  Returns:
    The logits float32 [M, C] and labels [M, C] of the test rows, and the values
    of `linear.predict` that describe the fit; None if the images do not have
    several labels.
  """
  y, held, test_y = linear.targets(data, seed, several=True)
  if y is None:
    return None
  logits_MC, fitted = linear.predict(
    linear.training_rows(data),
    y,
    held,
    data.test.features,
    metric=scores.mean_average_precision,
    num_outputs=y.shape[1],
    loss='sigmoid',
    mesh=data.mesh,
  )
  return logits_MC, test_y, fitted


def _recall(
  logits_MC: np.ndarray, hot_MC: np.ndarray, test: features.Split, seed: int
) -> dict[str, dict[str, float]]:
  """Returns the recall of each group of objects with its interval.

  The objects of an image are not independent, so the bootstrap resamples
  images. The count is that of the images with such objects.
  """
  image_O, label_O, area_O = _objects(hot_MC, test)
  if not len(image_O):
    return {}
  found_O = scores.highest(logits_MC, hot_MC)[image_O, label_O]
  groups = scores.by_size(area_O)
  groups |= scores.by_number(np.bincount(image_O)[image_O])
  out = {}
  for name, chosen_O in groups.items():
    if chosen_O.any():
      all_M = np.bincount(image_O[chosen_O])
      found_M = np.bincount(image_O[chosen_O], found_O[chosen_O])
      has = all_M > 0
      out[f'recall_{name}'] = intervals.bootstrap_of(
        scores.ratio, found_M[has], all_M[has], seed=seed
      )
  return out


def _objects(
  hot_MC: np.ndarray, test: features.Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the image, label and share of the image's area of every object.

  Objects whose label does not count, such as VOC's difficult ones, are left
  out.
  """
  images, labels, areas = [], [], []
  for row, number in enumerate(test.records):
    record = test.source[int(number)]
    known = record['box_labels'] >= 0
    known &= hot_MC[row, record['box_labels']] > 0
    left, top, right, bottom = record['boxes'][known].T
    width, height = transforms.read_size(record['image'])
    images += [row] * np.sum(known)
    labels += record['box_labels'][known].tolist()
    # Rounded, so that boxes of the same pixels have the same share.
    area = (right - left) * (bottom - top) / (width * height)
    areas += np.round(area, 6).tolist()
  return np.array(images, np.int64), np.array(labels, np.int64), np.array(areas)


def _f1(logits_MC: np.ndarray, hot_MC: np.ndarray, *, per_class: bool) -> float:
  """Returns the F1 score at a probability of 0.5, which is a logit of 0."""
  return scores.f1(logits_MC > 0, hot_MC, per_class=per_class)
