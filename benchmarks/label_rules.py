"""What labels know of scenes: rules of labelling compared without training.

  python benchmarks/label_rules.py --seeds=3 --results=docs/label_rules.json

Scenes of four digits, one in each quarter (`data.path=scenes/quadrants`), and
free scenes (`data.path=scenes`). A seed makes the clusters anew. What the file
has already is not measured again. `label_tables.py` makes its tables.

named: centers of single digits. A center's digit is the one that most of the
training crops nearest to it show. `named` is the share of a scene's digits that
are the digit of one of its labels, `right` the share of its labels whose digit
is in the scene.

presence: a center's profile is the share of its training scenes in which each
digit is. A scene's score of a digit is the mean over its labels' profiles;
presence mAP is the mean over the digits of the average precision.

bag: a logistic regression a digit, on which centers are among a scene's labels.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

# ruff: noqa: E402
import numpy as np
import sklearn.linear_model

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax.cluster import coverage
from mlcd_jax.data import digits
from mlcd_jax.data import scenes
from mlcd_jax.data import views
from mlcd_jax.embed import embedders
from mlcd_jax.evaluate import scores
from mlcd_jax.runtime import files

_COUNTS = {'train': 6_000, 'test': 2_000}
_SPLIT_SEEDS = {'train': 0, 'test': 2}  # Those of data/scenes.py.
_ITERATIONS = 25
_LABELS = (1, 2, 4, 8, 16)

# The random-members control draws the labels from this many nearest centers.
_NEAREST = 32


class Scenes(NamedTuple):
  """Scenes of both splits, by split.

  Attributes:
    pixels: uint8 [N, S, S, 3].
    labels: a list of int [n] for each scene, the digits of its objects.
    boxes: a list of int [n, 4] for each scene.
  """

  pixels: dict[str, np.ndarray]
  labels: dict[str, list[np.ndarray]]
  boxes: dict[str, list[np.ndarray]]

  def hot(self, split: str) -> np.ndarray:
    """Returns bool [N, 10]: which digits are in each scene."""
    out = np.zeros((len(self.labels[split]), 10), bool)
    for row, labels in zip(out, self.labels[split]):
      row[labels] = True
    return out


def compose(name: str) -> Scenes:
  """Composes the scenes that `data.path=scenes/NAME` has."""
  config = {c.name: c for c in scenes.CONFIGS}[name]
  pixels, classes, rows = digits.read()
  made = {}
  for split, count in _COUNTS.items():
    glyphs = [scenes.cut(p) for p in pixels[rows[split]]]
    labels = classes[rows[split]]
    made[split] = [
      scenes.compose(
        config, glyphs, labels, np.random.default_rng((_SPLIT_SEEDS[split], i))
      )
      for i in range(count)
    ]
  return Scenes(
    {s: np.stack([scene.pixels for scene in m]) for s, m in made.items()},
    {s: [scene.labels for scene in m] for s, m in made.items()},
    {s: [scene.boxes for scene in m] for s, m in made.items()},
  )


def unit_rows(rows: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
  """Returns unit rows, minus a mean before where one is given."""
  rows = rows if mean is None else rows - mean
  norm = np.linalg.norm(rows, axis=-1, keepdims=True)
  return (rows / np.maximum(norm, 1e-12)).astype(np.float32)


def hog(images: np.ndarray, size: int) -> np.ndarray:
  """Returns the raw HOG features of images of any size."""
  embedder = embedders.Hog(size)
  return embedder.features([embedder.prepare(image) for image in images])


def fit(rows: np.ndarray, num_centers: int, seed: int) -> np.ndarray:
  """Returns the centers [K, D] of exact k-means."""
  return kmeans.fit(
    rows,
    num_centers,
    iterations=_ITERATIONS,
    seed=seed,
    mesh=_mesh(),
    method='exact',
  ).centers


def _mesh():
  return sharding.make_mesh(1, 1)


def nearest(rows, centers, count):
  """Returns the `count` nearest centers of each row."""
  return kmeans.nearest_centers(rows, centers, count, mesh=_mesh())[0]


def pursuit(rows, centers, count):
  """Returns the centers of matching pursuit, -1 where there are no more."""
  # The features have no common mean, which `cluster.rule` would subtract.
  return kmeans.pursue(rows, centers, count, mesh=_mesh())[0]


def random_members(rows, centers, count):
  """Returns random ones of the nearest centers of each row, as a control."""
  found = nearest(rows, centers, min(_NEAREST, len(centers)))
  rng = np.random.default_rng(0)
  return rng.permuted(found, axis=1)[:, :count]


def presence_map(
  labels: Mapping[str, np.ndarray], data: Scenes, num_centers: int
) -> float:
  """Returns the mAP of the mean profile of each test scene's labels.

  Args:
    labels: by split, int [N, L], -1 where there is no label.
    data: the scenes that they belong to.
    num_centers: K, of all clusterings together.
  """
  hot = {split: data.hot(split).astype(np.int8) for split in labels}
  centers = coverage.Centers(labels['train'], hot['train'], num_centers)
  return centers.score(labels['test'], hot['test'])['presence_map']


def bag_map(labels: Mapping[str, np.ndarray], data: Scenes) -> float:
  """Returns the mAP of logistic regressions on each scene's bag of labels."""
  count = 1 + max(found.max() for found in labels.values())

  def bag(split):
    out = np.zeros((len(labels[split]), count + 1), np.float32)
    np.put_along_axis(out, labels[split], 1, axis=1)  # -1 is the last column.
    return out[:, :count]

  train, test = bag('train'), bag('test')
  hot = data.hot('train')
  scored = np.stack(
    [
      sklearn.linear_model.LogisticRegression(max_iter=300)
      .fit(train, hot[:, c])
      .decision_function(test)
      for c in range(hot.shape[1])
    ],
    axis=1,
  )
  return scores.mean_average_precision(scored, data.hot('test'))


def named(labels: np.ndarray, names: np.ndarray, hot: np.ndarray):
  """Returns the shares of digits that are named, and of labels that are right.

  Args:
    labels: int [N, L], -1 where there is no label.
    names: int [K], the digit of each center.
    hot: bool [N, 10], the digits of each scene.
  """
  given = labels >= 0
  said = np.zeros_like(hot)
  rows = np.arange(len(labels))[:, None].repeat(labels.shape[1], 1)
  said[rows[given], names[labels[given]]] = True
  right = np.take_along_axis(hot, names[labels], axis=1)[given]
  return float((said & hot).sum() / hot.sum()), float(right.mean())


class Quadrants:
  """Scenes of four digits with features of the whole and of the quarters."""

  def __init__(self):
    """Composes the scenes and embeds them."""
    self.data = compose('quadrants')
    half = self.data.pixels['train'].shape[1] // 2
    corners = [(y, x) for y in (0, half) for x in (0, half)]
    raw = {
      split: np.stack(
        [hog(p[:, y : y + half, x : x + half], half) for y, x in corners], 1
      )
      for split, p in self.data.pixels.items()
    }
    mean = raw['train'].mean((0, 1))
    self.crops = {s: unit_rows(r, mean) for s, r in raw.items()}
    whole = {s: hog(p, 2 * half) for s, p in self.data.pixels.items()}
    mean = whole['train'].mean(0)
    self.features = {
      'hog': {s: unit_rows(r, mean) for s, r in whole.items()},
      'mean': {s: unit_rows(r.mean(1)) for s, r in self.crops.items()},
    }

  def presence(self, seed: int) -> dict[str, float]:
    """Returns presence mAP with centers of whole scenes."""
    out = {}
    for feature, rows in self.features.items():
      for k in (50, 100, 1_000, 2_500):
        centers = fit(rows['train'], k, seed)
        out |= self._rules(f'{feature} K={k}', rows, centers)
      others = [fit(rows['train'], 100, 1_000 * seed + i) for i in range(8)]
      for count in (2, 4, 8):
        labels = {
          s: np.concatenate(
            [100 * i + nearest(r, c, 1) for i, c in enumerate(others[:count])],
            axis=1,
          )
          for s, r in rows.items()
        }
        out[f'{feature} K=100 independent {count}'] = presence_map(
          labels, self.data, 100 * count
        )
    return out

  def parts(self, seed: int) -> dict[str, float]:
    """Returns presence mAP, and what is named, with centers of crops."""
    crops = self.crops['train'].reshape(-1, self.crops['train'].shape[-1])
    centers = fit(crops, 300, seed)
    digit = np.concatenate(self.data.labels['train'])
    counts = np.zeros((300, 10), int)
    np.add.at(counts, (nearest(crops, centers, 1)[:, 0], digit), 1)
    names = counts.argmax(1)
    rows = self.features['mean']
    out = self._rules('mean K=300 crops', rows, centers)
    hot = self.data.hot('test')
    for rule in (nearest, pursuit, random_members):
      for count in (4, 8):
        found = named(rule(rows['test'], centers, count), names, hot)
        out |= self._named(f'{rule.__name__} {count}', found)
    labels = {
      s: nearest(x.reshape(-1, x.shape[-1]), centers, 1).reshape(-1, 4)
      for s, x in self.crops.items()
    }
    found = named(labels['test'], names, hot)
    out |= self._named('views 4', found)
    out['mean K=300 crops views 4'] = presence_map(labels, self.data, 300)
    return out

  def _named(self, name, found):
    return dict(zip((f'{name} named', f'{name} right'), found))

  def _rules(self, name, rows, centers):
    out = {}
    for rule in (nearest, pursuit, random_members):
      labels = {
        s: rule(r, centers, min(16, len(centers))) for s, r in rows.items()
      }
      for count in _LABELS:
        first = {s: found[:, :count] for s, found in labels.items()}
        out[f'{name} {rule.__name__} {count}'] = presence_map(
          first, self.data, len(centers)
        )
    return out


def _square(box, side):
  """Returns the smallest square around a box that lies in the image."""
  left, top, right, bottom = box
  size = min(side, max(right - left, bottom - top))
  x, y = (
    int(np.clip((a + b - size) // 2, 0, side - size))
    for a, b in ((left, right), (top, bottom))
  )
  return x, y, x + size, y + size


def _cut(pixels, box):
  """Returns the part of images [..., S, S, 3] in a box."""
  left, top, right, bottom = box
  return pixels[..., top:bottom, left:right, :]


class Free:
  """Scenes of two to six digits anywhere, with views of several kinds."""

  GRIDS = (1, 2, 3)

  def __init__(self):
    """Composes the scenes and embeds their views and their objects."""
    self.data = compose('free')
    raw, objects = {}, {}
    for split, pixels in self.data.pixels.items():
      side = pixels.shape[1]
      cells = views.boxes(side, side, self.GRIDS)
      raw[split] = np.stack([hog(_cut(pixels, cell), 28) for cell in cells], 1)
      objects[split] = [
        hog([_cut(image, _square(box, side)) for box in boxes], 28)
        for image, boxes in zip(pixels, self.data.boxes[split])
      ]
    mean = raw['train'].mean((0, 1))
    self.views = {s: unit_rows(r, mean) for s, r in raw.items()}
    self.objects = {
      s: [unit_rows(r, mean) for r in rows] for s, rows in objects.items()
    }

  def bags(self, seed: int) -> dict[str, float]:
    """Returns bag-of-labels mAP of views, of K = 400 centers of each kind."""
    k, out = 400, {}
    kinds = {
      'whole 1': (slice(0, 1), 1),
      'whole 8': (slice(0, 1), 8),
      '2x2': (slice(1, 5), 1),
      '3x3': (slice(5, 14), 1),
      'pyramid': (slice(0, 14), 1),
    }
    for name, (which, count) in kinds.items():
      rows = {s: v[:, which] for s, v in self.views.items()}
      dim = rows['train'].shape[-1]
      centers = fit(rows['train'].reshape(-1, dim), k, seed)
      labels = {
        s: nearest(r.reshape(-1, dim), centers, count).reshape(len(r), -1)
        for s, r in rows.items()
      }
      out[name] = bag_map(labels, self.data)
    centers = fit(np.concatenate(self.objects['train']), k, seed)
    labels = {}
    for split, objects in self.objects.items():
      labels[split] = np.full((len(objects), 6), -1)
      for row, found in zip(labels[split], objects):
        row[: len(found)] = nearest(found, centers, 1)[:, 0]
    out['true boxes'] = bag_map(labels, self.data)
    return out


def measure(path: pathlib.Path, seeds: Sequence[int]) -> None:
  """Measures what the file lacks, and writes it after every seed."""
  records = files.read_json(path) if path.exists() else {}
  opened = {}

  def part(name: str, kind: type, of: Callable) -> None:
    for seed in map(str, seeds):
      if seed in records.setdefault(name, {}):
        continue
      if kind not in opened:
        opened[kind] = kind()
      found = of(opened[kind], int(seed))
      records[name][seed] = {k: round(100 * v, 2) for k, v in found.items()}
      files.write_json(path, records)
      print(f'{name}, seed {seed}: done', flush=True)

  part('parts', Quadrants, Quadrants.parts)
  part('presence', Quadrants, Quadrants.presence)
  part('free', Free, Free.bags)


def main() -> None:
  """Measures what is missing."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--results', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  measure(arguments.results, range(arguments.seeds))


if __name__ == '__main__':
  main()
