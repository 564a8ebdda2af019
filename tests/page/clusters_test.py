"""The sample of clusters against what a plain loop over all rows gives."""

import numpy as np
import pytest

from mlcd_jax.page import clusters
from mlcd_jax.runtime import files

_ROWS = (40, 1, 59)
_CLUSTERS = 12


@pytest.fixture(name='written')
def fixture_written(tmp_path):
  """Label shards, and their content as whole arrays."""
  rng = np.random.default_rng(0)
  # Clusters 10 and 11 stay empty.
  labels = np.stack([rng.permutation(10)[:4] for _ in range(sum(_ROWS))])
  cosines = -np.sort(-rng.random(labels.shape), axis=1).astype(np.float16)
  start = 0
  for shard, count in enumerate(_ROWS):
    part = slice(start, start + count)
    files.write_npy(
      tmp_path / f'labels_{shard:05d}.npy', labels[part].astype(np.int32)
    )
    files.write_npy(tmp_path / f'scores_{shard:05d}.npy', cosines[part])
    start += count
  return clusters.Shards(tmp_path, _ROWS), labels, cosines


def test_rows_are_found_across_shards(written):
  shards, labels, cosines = written
  wanted = np.array([99, 40, 0, 41])
  found = shards.at(wanted)
  np.testing.assert_array_equal(found[0], labels[wanted])
  np.testing.assert_array_equal(found[1], cosines[wanted])


def test_statistics(written):
  shards, labels, cosines = written
  found = clusters.statistics(shards, _CLUSTERS)
  for cluster in range(_CLUSTERS):
    own = cosines[labels[:, 0] == cluster, 0].astype(float)
    assert found.sizes[cluster] == len(own)
    mean = own.mean() if len(own) else 0
    assert found.cosines[cluster] == pytest.approx(mean)
  assert found.histogram.sum() == 100
  assert found.histogram[:50].sum() == 0  # No cosine is negative.


def test_cosines_rounded_above_one_are_counted(tmp_path):
  files.write_npy(tmp_path / 'labels_00000.npy', np.zeros((1, 1), np.int32))
  files.write_npy(
    tmp_path / 'scores_00000.npy', np.full((1, 1), 1.001, np.float16)
  )
  found = clusters.statistics(clusters.Shards(tmp_path, [1]), 1)
  assert found.histogram[-1] == 1


def test_rows_without_a_label_are_in_no_cluster(tmp_path):
  labels = np.array([[11, 2], [-1, -1], [2, 11], [-1, -1]], np.int32)
  cosines = np.float16([[0.9, 0.5], [0, 0], [0.8, 0.7], [0, 0]])
  for shard, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 4))):
    files.write_npy(tmp_path / f'labels_{shard:05d}.npy', labels[rows])
    files.write_npy(tmp_path / f'scores_{shard:05d}.npy', cosines[rows])
  shards = clusters.Shards(tmp_path, (3, 0, 1))
  found = clusters.statistics(shards, _CLUSTERS)
  assert found.sizes.sum() == found.histogram.sum() == 2
  members = clusters.members(shards, np.array([2, 11]), _CLUSTERS)
  assert {c: rows.tolist() for c, (rows, _) in members.items()} == {
    2: [2], 11: [0]
  }  # fmt: skip


@pytest.mark.parametrize('count', [3, None])
def test_members_are_the_nearest(written, count):
  shards, labels, cosines = written
  found = clusters.members(shards, np.array([7, 2, 11]), _CLUSTERS, count=count)
  assert list(found) == [7, 2, 11]
  assert not len(found[11][0])
  for cluster in (7, 2):
    own = np.flatnonzero(labels[:, 0] == cluster)
    own = own[np.argsort(-cosines[own, 0], kind='stable')][:count]
    np.testing.assert_array_equal(found[cluster][0], own)
    np.testing.assert_array_equal(found[cluster][1], cosines[own, 0])


def test_sizes_in_powers_of_two():
  sizes = np.array([0, 1, 1, 2, 3, 4, 7, 8])
  assert clusters.size_histogram(sizes) == [
    [0, 0, 1],
    [1, 1, 2],
    [2, 3, 2],
    [4, 7, 2],
    [8, 15, 1],
  ]


def test_chosen_by_size_and_tightness():
  rng = np.random.default_rng(1)
  sizes = rng.permutation(500)
  found = clusters.Statistics(sizes, rng.random(500), np.zeros(100, np.int64))
  chosen = clusters.choose(found, seed=0)
  assert sizes[chosen['largest']].tolist() == list(range(499, 483, -1))
  assert sizes[chosen['smallest']].tolist() == list(range(1, 17))  # Not empty.
  assert 230 < sizes[chosen['median size']].mean() < 270
  tight = found.cosines[chosen['tightest']]
  several = np.sort(found.cosines[sizes > 1])
  np.testing.assert_array_equal(tight, several[::-1][:16])
  np.testing.assert_array_equal(found.cosines[chosen['loosest']], several[:16])
  assert len(set(chosen['random'].tolist())) == 16


def test_chosen_of_one_cluster():
  found = clusters.Statistics(np.array([5]), np.ones(1), np.zeros(100))
  assert all(c.tolist() == [0] for c in clusters.choose(found, 0).values())


def test_near_duplicates():
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(50, 8)).astype(np.float32)
  centers[31] = centers[4] + 0.01 * centers[5]
  centers[49] = centers[48]
  centers /= np.linalg.norm(centers, axis=1, keepdims=True)
  options = dict(count=3, seed=0, chunk=7)
  found = clusters.near_duplicates(centers, **options)
  assert [pair[:2] for pair in found[:2]] == [(48, 49), (4, 31)]
  cosines = centers @ centers.T - 2 * np.eye(50)
  assert found[0][2] == pytest.approx(1)
  assert found[2][2] == pytest.approx(np.sort(np.triu(cosines).ravel())[-3])

  sampled = clusters.near_duplicates(centers, max_compared=5, **options)
  assert sampled
  for a, b, cosine in sampled:
    assert a < b and cosine == pytest.approx(cosines[a, b], abs=1e-6)


def test_one_center_has_no_near_duplicate():
  assert clusters.near_duplicates(np.ones((1, 4)) / 2, count=3, seed=0) == []
