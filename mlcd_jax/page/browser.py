"""The cluster browser's and the image browser's data, with thumbnails."""

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

_NUM_IMAGES = 32  # In the image browser.
_NUM_PAIRS = 12  # Near-duplicate centers.
_NUM_LABELS = 8
_MEMBERS = 24  # Images of a cluster whose captions and classes count.
_SHOWN = 9  # Thumbnails of a cluster in its own card,
_SHOWN_BESIDE = 5  # and beside an image.
_MAX_CAPTION = 200
# True labels are read of so many images; above it, of a sample of clusters.
_MAX_LABELLED = 20_000
_NUM_ASKED = 400  # Images whose later labels are then looked at.


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the browsers are made from.

  Attributes:
    source: images, with classes and captions where it has them.
    embedded: of the embed stage; its rows are the labels' rows.
    shards: of the cluster stage.
    centers: [C, D] unit rows.
    num_labels: labels an image is trained with.
    seed: of the samples.
    root: folder of the images, see `matching.root_of`.
  """

  source: sources.Source
  embedded: shards_lib.Embeddings
  shards: clusters_lib.Shards
  centers: np.ndarray
  num_labels: int
  seed: int
  root: str = ''


def gather(inputs: Inputs) -> dict[str, Any]:
  """Returns a JSON value of bounded size, whatever the run's."""
  shards, total = inputs.shards, len(inputs.centers)
  found = clusters_lib.statistics(shards, total)
  groups = clusters_lib.choose(found, inputs.seed)
  pairs = clusters_lib.near_duplicates(
    inputs.centers, count=_NUM_PAIRS, seed=inputs.seed
  )
  rng = np.random.default_rng(inputs.seed)
  images = np.sort(_some(rng, shards.num_images, _NUM_IMAGES))
  labels, cosines = shards.at(images)
  has_label = labels[:, 0] >= 0  # Others were no rows to cluster.
  images, labels, cosines = (x[has_label] for x in (images, labels, cosines))
  labels, cosines = labels[:, :_NUM_LABELS], cosines[:, :_NUM_LABELS]
  chosen = _union(*groups.values(), [p[:2] for p in pairs], labels)
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
        'clusters': image_labels.tolist(),
        'cosines': _rounded(image_cosines),
      }
      for row, image_labels, image_cosines in zip(images, labels, cosines)
    ],
    'thumbnails': records.thumbnails(shown),
    'quality': _quality(inputs, found, images),
    'num_labels': inputs.num_labels,
  }


class _Records:
  """Keys, captions and records of some rows."""

  def __init__(self, inputs: Inputs, rows: np.ndarray):
    keys, captions = inputs.embedded.metadata(rows)
    self._source = inputs.source
    self._keys = dict(zip(rows.tolist(), keys))
    self.captions = dict(zip(rows.tolist(), captions))
    self._records = thumbnails.find(inputs.source, keys, inputs.root)

  def _record(self, row: int) -> dict[str, Any] | None:
    number = self._records.get(self._keys[int(row)])
    return None if number is None else self._source[number]

  def label(self, row: int) -> int | None:
    """The class; None where there is none."""
    if not self._source.num_classes:
      return None
    record = self._record(row)
    return None if record is None or record['label'] < 0 else record['label']

  def describe(self, row: int) -> dict[str, Any]:
    """Key, caption and class of a row."""
    return {
      'key': self._keys[int(row)],
      'caption': self.captions[int(row)][:_MAX_CAPTION],
      'label': self.label(row),
    }

  def thumbnail(self, row: int, size: int = thumbnails.SMALL) -> str | None:
    """A row's image as a data URL."""
    record = self._record(row)
    return record and thumbnails.make(record, size)

  def thumbnails(self, rows: np.ndarray) -> dict[int, dict[str, Any]]:
    """Row -> its description and `image`."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      images = pool.map(self.thumbnail, rows.tolist())
      return {
        row: self.describe(row) | {'image': image}
        for row, image in zip(rows.tolist(), images)
      }

  def classes(self, rows: Iterable[int]) -> dict[int, int]:
    """Row -> class, of the rows that have one."""
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
  """One cluster: how many images, how near, and the nearest of them."""
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
  """Agreement with true labels; None where there are none."""
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
  """Up to `count` different numbers below `total`, without a list of all."""
  if total <= 4 * count:
    return rng.permutation(total)[:count]
  drawn = np.unique(rng.integers(total, size=2 * count))
  return rng.permutation(drawn)[:count]


def _union(*parts: Any) -> np.ndarray:
  """All different numbers, sorted."""
  flat = [np.asarray(part, np.int64).ravel() for part in parts]
  return np.unique(np.concatenate(flat))


def _rounded(values: np.ndarray) -> list[float]:
  return [round(float(value), 4) for value in values]
