"""What labels know of attributes: by hand, by a dense reference, in a run."""

import json
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import stages
from mlcd_jax.cluster import coverage
from mlcd_jax.config import presets
from mlcd_jax.data import sources
from mlcd_jax.embed import shards
from mlcd_jax.runtime import files


def draw(seed, images=60, labels=4, centers=7, attributes=5, unknown=0.1):
  """Random labels with padding, and attributes of which some are unknown."""
  rng = np.random.default_rng(seed)
  of = np.argsort(rng.random((images, centers)), 1)[:, :labels].astype(np.int32)
  of[
    np.arange(labels)[None] >= rng.integers(1, labels + 1, images)[:, None]
  ] = -1
  hot = (rng.random((images, attributes)) < 0.4).astype(np.int8)
  hot[rng.random(hot.shape) < unknown] = -1
  return of, hot


def test_two_centers_and_three_attributes_by_hand():
  centers = coverage.Centers(
    np.array([[0, 1], [0, -1], [0, -1], [1, -1]]),
    np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], np.int8),
    3,  # The last center has no image.
  )
  # Center 0 has the attributes 3, 1 and 1 times in 3 images, center 1 has them
  # 1, 1 and 2 times in 2. So their names are 0 and 2, and with one image of the
  # frequencies 3/4, 1/2 and 1/2 added the profiles are
  #   (3.75, 1.5, 1.5) / 4 and (1.75, 1.5, 2.5) / 3.
  found = centers.score(
    np.array([[0, 1], [1, -1], [0, 1], [0, -1]]),
    np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], np.int8),
  )
  assert found == pytest.approx(
    {
      'coverage': (1 / 2 + 1 + 1 / 2) / 3,  # An image has no attribute.
      'precision': (1 + 1 + 0 + 1) / 6,
      'named': 1.0,
      # Two images have the same labels, so the same score.
      'presence_map': ((1 / 2 + 1 / 2 * 2 / 3) + 1 / 3 + (1 / 2 + 1 / 4)) / 3,
      'per_image': 6 / 4,
    }
  )


def test_ties_centers_without_images_and_without_names():
  centers = coverage.Centers(
    np.array([[0, 1], [1, -1]]), np.array([[0, 0], [0, 1]], np.int8), 3
  )
  # Center 0 has an image without attributes and center 2 no image: no names.
  found = centers.score(np.array([[0, 2]]), np.array([[1, 1]], np.int8))
  assert found['coverage'] == 0 and found['named'] == 0
  assert np.isnan(found['precision'])
  # Of attributes that are as frequent the lower one is the name.
  tied = coverage.Centers(
    np.array([[0], [0]]), np.array([[0, 1, 1], [0, 1, 1]], np.int8), 1
  )
  found = tied.score(np.array([[0]]), np.array([[0, 1, 0]], np.int8))
  assert found['coverage'] == found['precision'] == 1


def dense(labels, hot, scored, truth, num_centers):
  """The same in loops over centers and images."""
  base = (hot > 0).sum(0) / (hot >= 0).sum(0)
  guess = np.where(hot < 0, base[None], hot)
  names, profiles = [], []
  for k in range(num_centers):
    own = (labels == k).any(1)
    counts = (hot[own] > 0).sum(0)
    names.append(counts.argmax() if counts.any() else -1)
    profiles.append((guess[own].sum(0) + base) / (own.sum() + 1))
  shares, right, wrong, score, total, named = [], 0, 0, [], 0, 0
  for row, y in zip(scored, truth):
    row = row[row >= 0]
    own = [names[k] for k in row if names[k] >= 0]
    total, named = total + len(row), named + len(own)
    right += sum(y[n] == 1 for n in own)
    wrong += sum(y[n] == 0 for n in own)
    if (y > 0).any():
      shares.append(np.mean([c in own for c in np.flatnonzero(y > 0)]))
    score.append(np.mean([profiles[k] for k in row], axis=0))
  score = np.round(score, 9)  # So that ties are ties
  return {
    'coverage': np.mean(shares),
    'precision': right / (right + wrong),
    'named': named / total,
    'per_image': total / len(scored),
    'presence_map': np.mean(
      [
        metrics.average_precision_score(y[y >= 0], s[y >= 0])
        for y, s in zip(truth.T, score.T)
        if (y > 0).any()
      ]
    ),
  }


@pytest.mark.parametrize('seed', range(4))
def test_as_a_dense_reference(seed):
  # More attributes than are scored at a time.
  labels, hot = draw(seed, attributes=[5, 200][seed % 2])
  half = slice(0, 30), slice(30, 60)
  found = coverage.Centers(labels[half[0]], hot[half[0]], 9).score(
    labels[half[1]], hot[half[1]]
  )
  wanted = dense(
    labels[half[0]], hot[half[0]], labels[half[1]], hot[half[1]], 9
  )
  assert found == pytest.approx(wanted)


def test_both_halves_are_scored():
  labels, hot = draw(0)
  found = coverage.measure(labels, hot, 7, seed=3)['labels']['4']
  halves = np.array_split(np.random.default_rng(3).permutation(60), 2)
  wanted = [
    dense(labels[a], hot[a], labels[b], hot[b], 7)
    for a, b in (halves, halves[::-1])
  ]
  for name in wanted[0]:
    assert found[name] == pytest.approx(np.mean([w[name] for w in wanted]))


def test_a_perfect_labelling_has_one():
  rng = np.random.default_rng(0)
  hot = (rng.random((400, 3)) < 0.4).astype(np.int8)
  hot = hot[hot.any(1)]
  labels = np.where(hot > 0, np.arange(3)[None], -1)
  labels = np.sort(labels, 1)[:, ::-1]
  found = coverage.measure(labels, hot, 3, seed=0)['labels']['3']
  for name in ('coverage', 'precision', 'presence_map'):
    assert found[name] == pytest.approx(1)
    assert found[f'{name}_chance'] < 0.8


def test_labels_that_know_nothing_are_as_good_as_chance():
  labels, hot = draw(1, images=6_000, centers=40, attributes=10, unknown=0)
  for values in coverage.measure(labels, hot, 40, seed=0)['labels'].values():
    for name in ('coverage', 'precision', 'presence_map'):
      assert values[name] == pytest.approx(values[f'{name}_chance'], abs=0.02)
    # An attribute is in 0.4 of the images.
    assert values['precision_chance'] == pytest.approx(0.4, abs=0.02)
    assert values['presence_map_chance'] == pytest.approx(0.4, abs=0.02)


def test_chance_keeps_the_names():
  """Images all alike: the labels of another are as good as one's own."""
  labels = np.tile(np.arange(2), (40, 1))
  hot = np.tile(np.array([1, 1, 0], np.int8), (40, 1))
  found = coverage.measure(labels, hot, 2, seed=0)['labels']['2']
  assert found['coverage'] == found['coverage_chance'] == 0.5
  assert found['precision'] == found['precision_chance'] == 1


def test_every_number_of_labels_is_that_of_the_first_ones():
  labels, hot = draw(2, labels=6)
  found = coverage.measure(labels, hot, 7, seed=0)['labels']
  assert sorted(found) == ['1', '2', '4', '6']
  for count in (1, 2, 4):
    cut = coverage.measure(labels[:, :count], hot, 7, seed=0)
    assert cut['labels'][str(count)] == found[str(count)]


def test_images_without_label_or_attributes_are_left_out_and_counted():
  labels, hot = draw(3)
  found = coverage.measure(labels, hot, 7, seed=0)
  assert (found['images'], found['unlabelled'], found['unknown']) == (60, 0, 0)
  more = coverage.measure(
    np.concatenate([labels, np.full((3, 4), -1), labels[:2]]),
    np.concatenate([hot, np.ones((3, 5), np.int8), np.full((2, 5), -1)]),
    7,
    seed=0,
  )
  assert more == found | {'unlabelled': 3, 'unknown': 2}


@pytest.mark.parametrize('images', [0, 1])
def test_nothing_to_measure_is_null(images):
  labels, hot = draw(0, images=images, unknown=0)
  found = coverage.measure(labels, hot, 7, seed=0)
  assert found['images'] == images
  assert found['labels']['1']['precision'] is None
  json.dumps(found, allow_nan=False)


def test_a_million_centers_are_never_dense():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 1_000_000, (2_000, 8))
  hot = np.zeros((2_000, 1_000), np.int8)
  hot[:, ::300] = rng.random((2_000, 4)) < 0.5
  tracemalloc.start()
  coverage.measure(labels, hot, 1_000_000, seed=0)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # [K, C] in float32 would take 4 GB, and in int8 1 GB.
  assert peak < 200e6


@pytest.fixture(name='config')
def fixture_config():
  config = config_lib.default()
  presets.scenes(config)
  config.data.split = 'train[:150]'
  config.embed.image_size = 28
  config.embed.shard_rows = 64
  config.cluster.num_centers = 20
  config.cluster.iterations = 2
  config.train.steps = 1
  return config


def of_run(folder):
  path = folder / 'clusters/clustering.json'
  return json.loads(path.read_text()).get('label_quality')


def cluster(config, folder):
  stages.run(config, folder, ('embed', 'cluster'))


def test_a_run_measures_its_labels(config, tmp_path):
  cluster(config, tmp_path)
  found = of_run(tmp_path)
  labels = np.concatenate(
    [np.load(tmp_path / f'clusters/labels_{i:05d}.npy') for i in range(3)]
  )
  source = sources.make(config.data)
  hot = sources.multi_hot(source, np.arange(150))
  assert found == {
    'attributes_key': 'objects/label',
    **coverage.measure(labels, hot, 20, seed=config.seed),
  }
  assert sorted(found['labels'], key=int) == ['1', '2', '4', '8', '10']
  page = (tmp_path / 'report.html').read_text()
  assert '"label_quality":{"attributes_key":"objects/label"' in page

  # A sample of the images.
  rows = shards.open_made(manifests.load(tmp_path / 'embeddings'))
  config.data.attributes_key = 'objects/colour'
  coverage.run(config, tmp_path / 'clusters', rows, max_images=50)
  found = of_run(tmp_path)
  assert found['attributes_key'] == 'objects/colour' and found['images'] == 50


def test_finished_labels_are_measured_once_attributes_are_named(
  config, tmp_path
):
  config.data.attributes_key = config.data.boxes_key = ''
  cluster(config, tmp_path)
  assert of_run(tmp_path) is None
  made = manifests.load(tmp_path / 'clusters').fingerprint()
  labels = files.sha256(tmp_path / 'clusters/labels_00001.npy')

  config.data.attributes_key = 'objects/label'
  cluster(config, tmp_path)
  assert of_run(tmp_path)['images'] == 150
  assert manifests.load(tmp_path / 'clusters').fingerprint() == made
  assert files.sha256(tmp_path / 'clusters/labels_00001.npy') == labels

  path = tmp_path / 'clusters/clustering.json'
  before = path.stat().st_mtime_ns
  cluster(config, tmp_path)
  assert path.stat().st_mtime_ns == before


def test_rows_find_their_records_by_key(config, tmp_path):
  """Labels lie in the order of the embeddings, which may be another."""
  cluster(config, tmp_path)
  before = of_run(tmp_path)
  source = sources.make(config.data)
  order = np.random.default_rng(0).permutation(150)
  labels = np.concatenate(
    [np.load(tmp_path / f'clusters/labels_{i:05d}.npy') for i in range(3)]
  )
  keys = source.keys()[order]

  class Rows:
    shard_rows = [100, 0, 50]

    def keys(self):
      return keys

  for i, part in enumerate((slice(0, 100), slice(0, 0), slice(100, 150))):
    files.write_npy(
      tmp_path / f'clusters/labels_{i:05d}.npy', labels[order][part]
    )
  content = files.read_json(tmp_path / 'clusters/clustering.json')
  del content['label_quality']
  files.write_json(tmp_path / 'clusters/clustering.json', content)
  coverage.run(config, tmp_path / 'clusters', Rows())
  assert of_run(tmp_path) == before
