"""Measures what an image's labels know of its attributes, without training.

The images are split in two halves. One half says what each center stands for:
its name is the most frequent attribute of the images that it labels, its
profile the frequencies of all attributes. The other half is scored by these,
and the other way round.

Shapes: N images, L labels, K centers, C attributes.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import logging
import pathlib
from typing import Any

import ml_collections
import numpy as np
from scipy import sparse
from sklearn import metrics

from mlcd_jax.cluster import labels as labels_lib
from mlcd_jax.data import matching
from mlcd_jax.data import sources
from mlcd_jax.embed import row_files
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import files

_log = logging.getLogger(__name__)

KEY = 'label_quality'  # The name of the result in clustering.json.

# Numbers of labels that are scored, beside the number that is stored. The paper
# trains with 1 to 16 (MLCD Table 5c).
_NUM_LABELS = (1, 2, 4, 8)

# The most images that are measured; more are sampled. A share of 100,000 images
# is exact to 0.3 points. They take some minutes on two cores: two to read their
# records, and one with 80 attributes and 1M centers to measure them.
_MAX_IMAGES = 100_000

# The measures that labels without any knowledge have too.
_BY_CHANCE = ('coverage', 'precision', 'presence_map')

# Images of the average frequencies that are added to a profile. Without them a
# center with one image would be as sure as one with a hundred.
_PRIOR = 1.0

# Attributes whose scores exist at a time: those of 50,000 images take 51 MB.
_CHUNK = 128


def is_due(config: ml_collections.ConfigDict, folder: pathlib.Path) -> bool:
  """Returns whether clustering.json lacks the measures that the config asks.

  Args:
    config: the config of the run.
    folder: the folder of the cluster stage.
  """
  key = config.data.attributes_key

  def lacks() -> bool:
    known = files.read_json(folder / 'clustering.json').get(KEY, {})
    return known.get('attributes_key') != key

  return bool(key) and distributed.decide('label quality is due', lacks)


def run(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  rows: row_files.Sharded,
  *,
  max_images: int = _MAX_IMAGES,
) -> None:
  """Adds the measures to clustering.json if the config names attributes.

  Args:
    config: the config of the run.
    folder: the folder of the cluster stage, whose labels are complete.
    rows: the embeddings, whose keys the labels have.
    max_images: the most images to measure.

  Raises:
    UserError: the attributes do not exist, or the rows have no keys.
  """

  def write() -> bool:
    path = folder / 'clustering.json'
    content = files.read_json(path)
    content[KEY] = _of_files(
      config, folder, rows, content['num_centers'], max_images
    )
    files.write_json(path, content)
    return True

  if is_due(config, folder):
    distributed.decide('label quality', write)


def _of_files(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  rows: row_files.Sharded,
  num_centers: int,
  max_images: int,
) -> dict[str, Any]:
  """Returns the measures of the labels in a folder; see `run`."""
  key = config.data.attributes_key
  source = sources.make(config.data)
  root = matching.root_of(config.data.path)
  row_N = matching.join(source.keys(), rows.keys(), root)
  images = np.flatnonzero(row_N >= 0)
  if len(images) > max_images:
    rng = np.random.default_rng(config.seed)
    images = np.sort(rng.choice(images, max_images, replace=False))
  labels_NL = _read(
    folder, rows.shard_rows, row_N[images], config.cluster.num_labels
  )
  hot_NC = sources.multi_hot(source, images)
  result = measure(labels_NL, hot_NC, num_centers, seed=config.seed)
  _tell(result['labels'], config)
  return {'attributes_key': key, **result}


def _tell(
  by_count: Mapping[str, Mapping[str, float]], config: ml_collections.ConfigDict
) -> None:
  """Logs the measures of up to as many labels as an image is trained with."""
  fits = [int(n) for n in by_count if int(n) <= config.loss.num_positives]
  count = str(max(fits))
  values = {
    name: '?' if value is None else f'{100 * value:.1f} %'
    for name, value in by_count[count].items()
  }
  _log.info(
    "cluster: an image's labels 1 to %s name %s of its %s (another's %s), "
    'and %s of them name one (%s); see %s in clustering.json',
    count,
    values['coverage'],
    config.data.attributes_key,
    values['coverage_chance'],
    values['precision'],
    values['precision_chance'],
    KEY,
  )


def _read(
  folder: pathlib.Path,
  shard_rows: Sequence[int],
  rows_N: np.ndarray,
  num_labels: int,
) -> np.ndarray:
  """Reads the labels int32 [N, L] of some rows, shard by shard."""
  starts = np.cumsum([0, *shard_rows])
  shard_N = np.searchsorted(starts, rows_N, side='right') - 1
  out_NL = np.full((len(rows_N), num_labels), -1, np.int32)
  for shard in np.unique(shard_N).tolist():
    here = np.flatnonzero(shard_N == shard)
    labels = files.read_npy(labels_lib.label_path(folder, shard))
    out_NL[here] = labels[rows_N[here] - starts[shard]]
  return out_NL


def measure(
  labels_NL: np.ndarray, hot_NC: np.ndarray, num_centers: int, *, seed: int
) -> dict[str, Any]:
  """Scores the first l labels of the images, for l = 1, 2, 4, 8 and L.

  The centers are named by the same labels, since training with l labels shows
  a center the images that have it among l. An image without a label or without
  a known attribute is left out.

  Args:
    labels_NL: the centers of each image, best first; -1 is padding.
    hot_NC: int8: 1 if an image has the attribute, 0 if not, -1 if unknown.
    num_centers: K.
    seed: the seed of the halves and of the permutations.

  Returns:
    The number of `images`, and how many others are `unlabelled` or `unknown`.
    `labels` has the values of `Centers.score` by l, as text, each the mean of
    the two halves. Beside those of _BY_CHANCE stand, with _chance behind their
    names, the values if the labels are permuted among the scored images. A
    value is None if there is nothing to measure.
  """
  labelled_N = np.any(labels_NL >= 0, axis=1)
  known_N = np.any(hot_NC >= 0, axis=1)
  rng = np.random.default_rng(seed)
  use = rng.permutation(np.flatnonzero(labelled_N & known_N))
  halves = np.array_split(use, 2)
  others = [rng.permutation(half) for half in halves]
  most = labels_NL.shape[1]
  by_count = {}
  for count in sorted({*(n for n in _NUM_LABELS if n < most), most}):
    labels = labels_NL[:, :count]
    values = []
    for named, scored, other in zip(halves[::-1], halves, others):
      centers = Centers(labels[named], hot_NC[named], num_centers)
      own = centers.score(labels[scored], hot_NC[scored])
      chance = centers.score(labels[other], hot_NC[scored])
      values.append(own | {f'{k}_chance': chance[k] for k in _BY_CHANCE})
    by_count[str(count)] = {
      name: _mean([v[name] for v in values]) for name in sorted(values[0])
    }
  return {
    'images': len(use),
    'unlabelled': int(np.sum(~labelled_N)),
    'unknown': int(np.sum(labelled_N & ~known_N)),
    'labels': by_count,
  }


class Centers:
  """What the centers stand for, by the images that they label."""

  def __init__(
    self, labels_NL: np.ndarray, hot_NC: np.ndarray, num_centers: int
  ):
    """Counts the images and attributes of every center.

    Args:
      labels_NL: the centers of each image; -1 is padding.
      hot_NC: as in `measure`.
      num_centers: K.
    """
    bags_NK = _bags(labels_NL, num_centers)
    positive_NC = sparse.csr_array(hot_NC > 0, dtype=np.float64)
    self._base_C = _share(
      positive_NC.sum(0), np.sum(hot_NC >= 0, axis=0), empty=0.0
    )
    self._names_K = _most_frequent(bags_NK.T @ positive_NC)
    # An unknown attribute counts as its average frequency.
    unknown_NC = sparse.csr_array(hot_NC < 0, dtype=np.float64)
    guess_NC = positive_NC + unknown_NC @ sparse.diags_array(self._base_C)
    # Kept sparse, since 1M centers by 1,000 attributes would take 8 GB.
    self._sums_KC = (bags_NK.T @ guess_NC).tocsc()
    self._weights_K = 1 / (bags_NK.sum(0) + _PRIOR)

  def score(
    self, labels_NL: np.ndarray, hot_NC: np.ndarray
  ) -> dict[str, float]:
    """Scores other images by the names and profiles of their centers.

    Returns:
      coverage: the mean, over images that have attributes, of the share of them
        that are the name of one of the labels.
      precision: the share of the labels with a name that name an attribute of
        the image.
      named: the share of the labels whose center has a name.
      presence_map: the mean over attributes of the average precision, if images
        are ranked by the mean profile of their labels.
      per_image: the mean number of labels.
      A value is NaN if there is nothing to measure.
    """
    count_N = np.sum(labels_NL >= 0, axis=1)
    name_NL = np.where(labels_NL >= 0, self._names_K[labels_NL], -1)
    image, place = np.nonzero(name_NL >= 0)
    name = name_NL[image, place]
    truth = hot_NC[image, name]
    named_NC = sparse.csr_array(
      (np.ones(len(name)), (image, name)), shape=hot_NC.shape
    )
    positive_NC = sparse.csr_array(hot_NC > 0, dtype=np.float64)
    covered_N = (named_NC > 0).multiply(positive_NC).sum(1)
    there_N = positive_NC.sum(1)
    has = there_N > 0
    return {
      'coverage': _share(np.sum(covered_N[has] / there_N[has]), has.sum()),
      'precision': _share(np.sum(truth > 0), np.sum(truth >= 0)),
      'named': _share(len(name), count_N.sum()),
      'presence_map': self._presence_map(labels_NL, hot_NC),
      'per_image': _share(count_N.sum(), len(count_N)),
    }

  def _presence_map(self, labels_NL: np.ndarray, hot_NC: np.ndarray) -> float:
    """Returns the mean average precision of the mean profiles."""
    bags_NK = _bags(labels_NL, len(self._weights_K))
    mean_NK = sparse.diags_array(1 / np.maximum(bags_NK.sum(1), 1)) @ bags_NK
    mean_NK = mean_NK @ sparse.diags_array(self._weights_K)
    prior_N = _PRIOR * mean_NK.sum(1)
    each = []
    for start in range(0, hot_NC.shape[1], _CHUNK):
      part = slice(start, start + _CHUNK)
      scores = (mean_NK @ self._sums_KC[:, part]).toarray()
      scores += prior_N[:, None] * self._base_C[None, part]
      # Means that are equal but for the rounding of their sums rank equally.
      scores = np.round(scores, 9)
      for score, hot in zip(scores.T, hot_NC[:, part].T):
        known = hot >= 0
        if np.any(hot > 0):
          each.append(metrics.average_precision_score(hot[known], score[known]))
    return float(np.mean(each)) if each else float('nan')


def _bags(labels_NL: np.ndarray, num_centers: int) -> sparse.csr_array:
  """Returns the number of times that an image has a center as a label, [N, K].

  It is sparse: 50,000 images by 1M centers would take 400 GB.
  """
  image, place = np.nonzero(labels_NL >= 0)
  return sparse.csr_array(
    (np.ones(len(image)), (image, labels_NL[image, place])),
    shape=(len(labels_NL), num_centers),
  )


def _most_frequent(counts_KC: sparse.sparray) -> np.ndarray:
  """Returns the column of each row's greatest count, int64 [K].

  Of equal counts the lower column wins; a row without counts has -1.
  """
  counts = counts_KC.tocoo()
  row, column = counts.coords
  order = np.lexsort((column, -counts.data, row))
  # np.unique gives the first place of each row, which has its greatest count.
  rows, first = np.unique(row[order], return_index=True)
  out_K = np.full(counts.shape[0], -1)
  out_K[rows] = column[order][first]
  return out_K


def _share(part: Any, whole: Any, *, empty: float = np.nan) -> Any:
  """Returns part / whole, and `empty` where whole is 0."""
  share = np.where(whole > 0, part / np.maximum(whole, 1), empty)
  return share if share.ndim else float(share)


def _mean(values: Sequence[float]) -> float | None:
  """Returns the mean of the defined values; None if there is none."""
  known = [value for value in values if np.isfinite(value)]
  return float(np.mean(known)) if known else None
