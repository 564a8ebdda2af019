"""Figures that mean something on small data: emoji drawn by two vendors.

  python benchmarks/emoji.py --data=FOLDER [--encoder=PATH]

FOLDER has noto.tar and fluent.tar, WebDataset tars of 64-pixel images with a
json each (key, name, category); equal keys are the same emoji. A linear probe
tells Noto's categories, fitted on 70 % of the emoji and scored on the others,
and each of Fluent's emoji looks for its twin among Noto's. PATH is whatever
evaluate.encoder takes; raw pixels and histograms of oriented gradients are
scored beside it.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jax.sharding import Mesh
import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.embed import embedders
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate.tasks import linear
from mlcd_jax.evaluate.tasks import retrieval

_TRAIN = 0.7
_HOG_SIZE = 56  # Pixels.


def main() -> None:
  """Prints one JSON object an encoder."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--data', required=True)
  parser.add_argument('--encoder', default='')
  args = parser.parse_args()
  scored = baselines()
  if args.encoder:
    scored[args.encoder] = encoders.load(args.encoder, sharding.make_mesh())
  for name, encoder in scored.items():
    print(json.dumps({'encoder': name} | score(encoder, name, args.data)))


def baselines() -> dict[str, encoders.Encoder]:
  """Raw pixels, and histograms of oriented gradients."""
  return {
    'raw': encoders.raw_pixels(),
    'hog': encoders.from_embedder(embedders.Hog(_HOG_SIZE)),
  }


def score(encoder: encoders.Encoder, name: str, data: str) -> dict[str, float]:
  """Scores one encoder.

  Args:
    encoder: images to features.
    name: of it, in progress lines.
    data: the folder of noto.tar and fluent.tar.

  Returns:
    category_ and twin_ metrics, with 95 % bootstrap intervals.
  """
  mesh = sharding.make_mesh()
  config = config_lib.default()
  config.data.source = 'webdataset'
  config.data.caption_key = 'json'
  extract = features.Extractor(encoder, name, config.evaluate.batch_size)
  found = {}
  for vendor in ('noto', 'fluent'):
    config.data.path = str(pathlib.Path(data) / f'{vendor}.tar')
    found[vendor] = extract(sources.make(config.data), vendor)
  scores = _categories(found['noto'], mesh, config)
  scores |= _twins(found['noto'], found['fluent'], mesh)
  return {k: round(float(v), 4) for k, v in scores.items()}


def _categories(noto: features.Split, mesh: Mesh, config) -> dict[str, float]:
  """A linear probe of the category on emoji that it was not fitted on."""
  told = [json.loads(text)['category'] for text in noto.values('caption')]
  names, labels = np.unique(told, return_inverse=True)
  noto = dataclasses.replace(noto, labels=labels.astype(np.int32))
  order = np.random.default_rng(0).permutation(len(noto))
  cut = round(_TRAIN * len(noto))
  train, test = (
    features.Split(noto.features[rows], noto.labels[rows])
    for rows in (order[:cut], order[cut:])
  )
  data = features.Data(train, test, len(names), mesh)
  found = linear.run(data, config)
  majority = np.bincount(test.labels).max() / len(test)
  return {f'category_{k}': v for k, v in found.items()} | {
    'category_majority': majority
  }


def _twins(
  noto: features.Split, fluent: features.Split, mesh: Mesh
) -> dict[str, float]:
  """Recall of the same emoji of the other vendor."""
  keys = [
    np.array([int(json.loads(text)['key']) for text in split.values('caption')])
    for split in (fluent, noto)
  ]
  found = retrieval.recalls(
    fluent.features, keys[0], noto.features, keys[1], mesh=mesh
  )
  return {
    f'twin_{name}{suffix}': value
    for name, hits in found.items()
    for suffix, value in intervals.bootstrap(hits, seed=0).items()
  }


if __name__ == '__main__':
  main()
