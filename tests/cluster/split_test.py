"""What hangs on the rows' keys: the start, and what is held out."""

import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax.cluster import split
from tests import row_shards


def make_config():
  config = config_lib.default()
  config.cluster.num_centers = 20
  return config


def test_start_and_held_out_do_not_depend_on_the_files(tmp_path):
  x = row_shards.make_rows()
  keys = np.array([f'image {i}' for i in range(len(x))])
  config = make_config()
  chosen = []
  for name, cuts, order in (
    ('a', (300, 650), None),
    ('b', (300, 650), [2, 0, 1]),
    ('c', (10, 900), [1, 2, 0]),
  ):
    rows = row_shards.write(tmp_path / name, x, cuts, keys, order)
    found = split.choose(rows, config)
    assert len(found.held_out) == 10
    assert not set(found.held_out) & set(found.first)
    all_keys = rows.keys()
    chosen.append((all_keys[found.first], set(all_keys[found.held_out])))
  for found in chosen[1:]:
    np.testing.assert_array_equal(found[0], chosen[0][0])
    assert found[1] == chosen[0][1]
  config.seed = 1
  other = split.choose(rows, config)
  assert set(all_keys[other.first]) != set(chosen[0][0])


def test_without_keys_the_files_names_and_places_choose(tmp_path):
  x = row_shards.make_rows()
  a = row_shards.write(tmp_path / 'a', x, (300, 650))
  b = row_shards.write(tmp_path / 'b', x, (300, 650), order=[1, 2, 0])
  first = [
    rows.take(split.choose(rows, make_config()).first) for rows in (a, b)
  ]
  np.testing.assert_array_equal(*first)


def test_the_views_of_an_image_are_held_out_together(tmp_path):
  x = row_shards.make_rows(3_000)
  keys = np.array([f'image {i // 5}' for i in range(3_000)])
  config, chosen = make_config(), []
  for name, order in (('a', None), ('b', [2, 0, 1])):
    rows = row_shards.write(tmp_path / name, x, (500, 1_200), keys, order)
    rows.rows_per_image = 5
    assert len(set(split.row_hashes(rows, 0))) == 3_000
    found = split.choose(rows, config)
    assert not set(found.held_out) & set(found.first)
    # A hundredth of the rows, the five of each of six images.
    starts = found.held_out[::5]
    assert len(starts) == 6 and (starts % 5 == 0).all()
    np.testing.assert_array_equal(
      found.held_out, (starts[:, None] + np.arange(5)).ravel()
    )
    # The first centers are rows of different images.
    first = rows.keys()[found.first]
    assert len(set(first[:20])) > 15
    numbers = found.first % 5
    assert len(set(numbers[:20])) == 5
    chosen.append((first, numbers, set(rows.keys()[found.held_out])))
  for a, b in zip(*chosen):
    np.testing.assert_array_equal(a, b)


def test_row_numbers_are_spread_evenly(tmp_path):
  keys = np.array([f'{i:09d}' for i in range(20_000)] + ['a' * 30, 'é'])
  rows = row_shards.write(
    tmp_path / 'a', np.ones((len(keys), 1), np.float32), (), keys
  )
  hashes = split.row_hashes(rows, 0)
  assert len(set(hashes)) == len(hashes)
  counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
  assert np.abs(counts - 1_250).max() < 5 * 1_250**0.5
  assert abs(np.corrcoef(hashes, np.arange(len(hashes)))[0, 1]) < 0.03


def test_training_leaves_out_what_is_held_out():
  x = row_shards.make_rows(50)
  left_out = np.array([0, 1, 7, 30, 49])
  rows = split.Training(x, left_out)
  expected = np.delete(x, left_out, 0)
  assert rows.shape == expected.shape
  for start in range(46):
    assert rows.row(start if start < 45 else 0) not in left_out
    for stop in range(start, 46):
      np.testing.assert_array_equal(rows[start:stop], expected[start:stop])
