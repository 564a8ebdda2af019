"""The data and thumbnails of the page's cluster browser and image browser."""

from collections.abc import Iterable
from collections.abc import Mapping
from concurrent import futures
import dataclasses
import os
from typing import Any

import numpy as np

from mlcd_jax.data import sources
from mlcd_jax.embed import shards as shards_lib
from mlcd_jax.page import agreement
from mlcd_jax.page import cluster_names
from mlcd_jax.page import clusters as clusters_lib
from mlcd_jax.page import thumbnails

# These limits bound the size of the page, and the time to read records, for
# any number of images and clusters.
_NUM_IMAGES = 32  # Images in the image browser.
_NUM_PAIRS = 12  # Pairs of near-duplicate centers.
_NUM_LABELS = 8  # Labels of an image.
_MEMBERS = 24  # Images that give a cluster its name and its class.
_SHOWN = 9  # Thumbnails of a cluster in its own card.
_SHOWN_BESIDE = 5  # Thumbnails of a cluster beside an image or in a pair.
_MAX_CAPTION = 200  # Characters of a caption.
# With more images than this, the true classes of a sample of clusters are read.
_MAX_LABELLED = 20_000
# Then the labels of this many images are compared with their classes.
_NUM_ASKED = 400


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The data of a run from which the browsers are made.

  Attributes:
    source: the images, possibly with classes and captions.
    embedded: the result of the embed stage; its rows are those of the labels.
    shards: the labels and cosines from the cluster stage.
    centers: [C, D] unit rows.
    num_labels: the number of labels that an image is trained with.
    seed: the seed of the samples.
    root: the folder of the images; see `matching.root_of`.
    rule: the cluster.rule that gave the labels.
  """

  source: sources.Source
  embedded: shards_lib.Embeddings
  shards: clusters_lib.Shards
  centers: np.ndarray
  num_labels: int
  seed: int
  root: str = ''
  rule: str = 'nearest'


def gather(inputs: Inputs) -> dict[str, Any]:
  """Returns the data of both browsers as a JSON value of bounded size."""
  shards, total = inputs.shards, len(inputs.centers)
  found = clusters_lib.statistics(shards, total)
  groups = clusters_lib.choose(found, inputs.seed)
  pairs = clusters_lib.near_duplicates(
    inputs.centers, count=_NUM_PAIRS, seed=inputs.seed
  )
  rng = np.random.default_rng(inputs.seed)
  images = np.sort(_some(rng, shards.num_images, _NUM_IMAGES))
  labels, cosines = shards.at(images)
  # The cluster stage leaves out rows that are zero or not finite.
  has_label = labels[:, 0] >= 0
  images, labels, cosines = (x[has_label] for x in (images, labels, cosines))
  labels, cosines = labels[:, :_NUM_LABELS], cosines[:, :_NUM_LABELS]
  chosen = _union(*groups.values(), [p[:2] for p in pairs], labels[labels >= 0])
  nearest = clusters_lib.members(shards, chosen, total, count=_MEMBERS)
  rows = _union(images, *(r for r, _ in nearest.values()))
  records = _Records(inputs, rows)
  named = cluster_names.from_captions(
    {c: [records.captions[r] for r in m] for c, (m, _) in nearest.items()}
  )
  cards = {
    c: _card(members, found, c, named, records)
    for c, members in nearest.items()
  }
  own = {int(c) for group in groups.values() for c in group}
  for c, card in cards.items():
    if c not in own:
      card['rows'] = card['rows'][:_SHOWN_BESIDE]
  shown = _union(images, *(card['rows'] for card in cards.values()))
  return {
    'num_images': shards.num_images,
    'num_clusters': total,
    'num_empty': int(np.sum(found.sizes == 0)),
    'sizes': clusters_lib.size_histogram(found.sizes),
    'cosines': found.histogram.tolist(),
    'cosine_edges': [-1, 1],
    'groups': {name: ids.tolist() for name, ids in groups.items()},
    'pairs': pairs,
    'cards': cards,
    'images': [
      records.describe(row)
      | {
        'row': int(row),
        'large': records.thumbnail(row, thumbnails.LARGE),
        # A rule may give an image fewer labels than are stored.
        'clusters': image_labels[image_labels >= 0].tolist(),
        'cosines': _rounded(image_cosines[image_labels >= 0]),
      }
      for row, image_labels, image_cosines in zip(images, labels, cosines)
    ],
    'thumbnails': records.thumbnails(shown),
    'quality': _quality(inputs, found, images),
    'num_labels': inputs.num_labels,
    'rule': inputs.rule,
  }


class _Records:
  """The keys, captions and records of some rows of the embeddings.

  Attributes:
    captions: the captions by row, '' for none.
  """

  def __init__(self, inputs: Inputs, rows: np.ndarray):
    """Reads the keys and captions, and looks up the records.

    Args:
      inputs: the data of the run.
      rows: the rows, each once.
    """
    keys, captions = inputs.embedded.metadata(rows)
    self._source = inputs.source
    self._keys = dict(zip(rows.tolist(), keys))
    self.captions = dict(zip(rows.tolist(), captions))
    self._records = thumbnails.find(inputs.source, keys, inputs.root)

  def _record(self, row: int) -> dict[str, Any] | None:
    """Returns the record of a row; None if the source no longer has it."""
    number = self._records.get(self._keys[int(row)])
    return None if number is None else self._source[number]

  def label(self, row: int) -> int | None:
    """Returns the class of a row; None if it has none."""
    if not self._source.num_classes:
      return None
    record = self._record(row)
    return None if record is None or record['label'] < 0 else record['label']

  def describe(self, row: int) -> dict[str, Any]:
    """Returns the key, caption and class of a row."""
    return {
      'key': self._keys[int(row)],
      'caption': self.captions[int(row)][:_MAX_CAPTION],
      'label': self.label(row),
    }

  def thumbnail(self, row: int, size: int = thumbnails.SMALL) -> str | None:
    """Returns the image of a row as a data URL; None if it cannot be read."""
    record = self._record(row)
    return record and thumbnails.make(record, size)

  def thumbnails(self, rows: np.ndarray) -> dict[int, dict[str, Any]]:
    """Returns the description of every row with its thumbnail as `image`."""
    # Threads, since decoding releases Python's lock.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      images = pool.map(self.thumbnail, rows.tolist())
      return {
        row: self.describe(row) | {'image': image}
        for row, image in zip(rows.tolist(), images)
      }

  def classes(self, rows: Iterable[int]) -> dict[int, int]:
    """Returns the classes by row, without the rows that have none."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      rows = [int(row) for row in rows]
      labels = pool.map(self.label, rows)
      return {r: int(x) for r, x in zip(rows, labels) if x is not None}


def _card(
  members: tuple[np.ndarray, np.ndarray],
  found: clusters_lib.Statistics,
  cluster: int,
  named: Mapping[int, str],
  records: _Records,
) -> dict[str, Any]:
  """Returns the card of a cluster: its size, name, class and nearest images.

  Args:
    members: the rows and cosines of its nearest images, nearest first.
    found: the statistics of all clusters.
    cluster: the number of the cluster.
    named: the names of clusters; some have none.
    records: the records of the rows.
  """
  rows, cosines = members
  classes = records.classes(rows)
  return {
    'size': int(found.sizes[cluster]),
    'cosine': round(float(found.cosines[cluster]), 4),
    'name': named.get(cluster, ''),
    'class': agreement.majority(classes),
    'rows': rows[:_SHOWN].tolist(),
    'cosines': _rounded(cosines[:_SHOWN]),
  }


def _quality(
  inputs: Inputs, found: clusters_lib.Statistics, images: np.ndarray
) -> dict[str, Any] | None:
  """Returns the agreement of labels with true classes; None without classes.

  Purity and mutual information need all images of a cluster. Up to 20,000
  images it takes all clusters and compares the labels of all images. Above, it
  takes a random sample of clusters with that many images, and compares the
  labels of another sample of images.

  Args:
    inputs: the data of the run.
    found: the statistics of all clusters.
    images: the rows in the image browser.
  """
  if not inputs.source.num_classes:
    return None
  shards, total = inputs.shards, len(inputs.centers)
  rng = np.random.default_rng(inputs.seed)
  whole = shards.num_images <= _MAX_LABELLED
  if whole:
    asked, clusters = np.arange(shards.num_images), np.flatnonzero(found.sizes)
  else:
    asked = np.sort(_some(rng, shards.num_images, _NUM_ASKED))
    clusters = rng.permutation(np.flatnonzero(found.sizes))
    fits = np.cumsum(found.sizes[clusters]) <= _MAX_LABELLED
    clusters = np.sort(clusters[fits])
  labels = shards.at(asked)[0][:, :_NUM_LABELS]
  # `complete` has all images of its clusters. `around` has those that vote for
  # the class of each label; in a sample these are the nearest ones only.
  complete = clusters_lib.members(shards, clusters, total)
  around = complete
  if not whole:
    around = clusters_lib.members(
      shards, _union(labels[labels >= 0]), total, count=_MEMBERS
    )
  rows = _union(
    asked, *(m for part in (complete, around) for m, _ in part.values())
  )
  classes = _Records(inputs, rows).classes(rows)
  asked_known = np.array([int(row) in classes for row in asked], bool)
  asked_known &= labels[:, 0] >= 0
  pairs = [
    (c, classes[r])
    for c, (m, _) in complete.items()
    for r in m.tolist()
    if r in classes
  ]
  if not pairs or not asked_known.any():
    return None
  of_cluster, truth = np.array(pairs).T
  votes = {
    c: {r: classes[r] for r in m.tolist() if r in classes}
    for c, (m, _) in around.items()
  }
  asked, labels = asked[asked_known], labels[asked_known]
  return {
    **agreement.agreement(of_cluster, truth),
    **agreement.ranks(
      labels, np.array([classes[int(r)] for r in asked]), votes, asked
    ),
    'counted': len(pairs),
    'clusters': len(np.unique(of_cluster)),
  }


def _some(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
  """Returns up to `count` different random numbers below `total`.

  For a large `total` it does not make a list of all numbers.
  """
  if total <= 4 * count:
    return rng.permutation(total)[:count]
  drawn = np.unique(rng.integers(total, size=2 * count))
  return rng.permutation(drawn)[:count]


def _union(*parts: Any) -> np.ndarray:
  """Returns the different numbers of all parts, sorted."""
  flat = [np.asarray(part, np.int64).ravel() for part in parts]
  return np.unique(np.concatenate(flat))


def _rounded(values: np.ndarray) -> list[float]:
  """Returns the values with four decimals, which keeps the page small."""
  return [round(float(value), 4) for value in values]
