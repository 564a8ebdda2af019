"""Differences between encoders that were scored on the same test images.

A difference is uncertain in two ways. Another seed gives other clusters,
weights and crops: the spread of the seeds' differences measures this. Other
test images give other scores: the delete-a-group jackknife measures this. It
scores the encoders again without one of `GROUPS` groups of the test images
(Shao and Tu 1995, chapter 2). It holds for any score, also for one like mAP
that is not the mean over images.

Shapes: S seeds, G groups, M test images.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

from jax.sharding import Mesh
import ml_collections
import numpy as np
import scipy.stats

from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import labelled
from mlcd_jax.evaluate import scores as scores_lib
from mlcd_jax.evaluate import stage
from mlcd_jax.evaluate.tasks import multi_label

GROUPS = 50


def score(
  config: ml_collections.ConfigDict, encoder: encoders.Encoder, mesh: Mesh
) -> tuple[dict[str, float], dict[str, list[float]]]:
  """Scores an encoder by the multi-label probe on the config's data sets.

  Returns:
    The scores, by the names of results.json; and by the same names the scores
    of `without_groups`.
  """
  extract = features.Extractor(encoder, 'trained', config.evaluate.batch_size)
  values, without = {}, {}
  for name, splits in stage.open_sources(config).items():
    data = features.Data(
      **{split: extract(s, f'{name} {split}') for split, s in splits.items()},
      num_classes=0,
      mesh=mesh,
      config=config.evaluate.datasets[name],
    )
    data = labelled.keep('multi_label', data, name)
    logits, test_y, _ = multi_label.predict(data, config.seed)
    for metric, of in {
      'mAP': scores_lib.mean_average_precision,
      'exact_set': lambda z, y: float(np.nanmean(scores_lib.exact_set(z, y))),
    }.items():
      key = f'trained/{name}/multi_label/{metric}'
      values[key] = of(logits, test_y)
      without[key] = without_groups(of, logits, test_y).round(6).tolist()
  return values, without


@dataclasses.dataclass(frozen=True)
class Difference:
  """A mean difference over seeds.

  Attributes:
    mean: the mean.
    half: half of the width of its 95 % interval, of seeds and test images.
    p: of the two-sided test that there is no difference.
  """

  mean: float
  half: float
  p: float


def without_groups(
  metric: Callable[[np.ndarray, np.ndarray], float],
  scores: np.ndarray,
  labels: np.ndarray,
) -> np.ndarray:
  """Returns the metric [G] without each of the groups.

  The groups are the same for all encoders: image i is in the group i modulo G.

  Args:
    metric: a function (scores, labels) -> value.
    scores: [M, ...].
    labels: [M, ...].
  """
  group = np.arange(len(labels)) % GROUPS
  return np.array(
    [metric(scores[group != g], labels[group != g]) for g in range(GROUPS)]
  )


def difference(
  ours: Sequence[float],
  theirs: Sequence[float],
  ours_without: np.ndarray,
  theirs_without: np.ndarray,
) -> Difference:
  """Returns the mean difference between two encoders.

  The variances of seeds and of test images add up. The degrees of freedom are
  Satterthwaite's.

  Args:
    ours: a score for each of S seeds, at least two.
    theirs: the scores of the same seeds.
    ours_without: the scores [S, G] of `without_groups`.
    theirs_without: the same of the others.
  """
  of_seed = np.subtract(ours, theirs)
  of_group = np.subtract(ours_without, theirs_without).mean(axis=0)
  seeds, groups = len(of_seed), len(of_group)
  by_seed = of_seed.var(ddof=1) / seeds
  by_image = (groups - 1) * of_group.var()
  variance = by_seed + by_image
  mean = float(of_seed.mean())
  if not variance:
    return Difference(mean, 0.0, float(mean == 0))
  freedom = variance**2 / (
    by_seed**2 / (seeds - 1) + by_image**2 / (groups - 1)
  )
  student = scipy.stats.t(freedom, scale=np.sqrt(variance))
  half = float(student.ppf(0.975))
  return Difference(mean, half, float(2 * student.sf(abs(mean))))


def holm(p: Sequence[float]) -> list[float]:
  """Returns the p-values corrected for their number (Holm 1979)."""
  order = np.argsort(p)
  factors = np.arange(len(p), 0, -1)
  corrected = np.maximum.accumulate(np.asarray(p)[order] * factors)
  out = np.empty(len(p))
  out[order] = np.minimum(corrected, 1.0)
  return out.tolist()
