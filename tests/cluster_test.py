"""The cluster stage: what is held out, where it starts, what it reports."""

import json
import logging

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlcd_jax import cluster
from mlcd_jax import config as config_lib
from mlcd_jax import errors
from mlcd_jax import hierarchy
from mlcd_jax import row_files
from mlcd_jax import sharding

DIM = 8


@pytest.fixture(name='mesh')
def fixture_mesh():
  return sharding.make_mesh(2, 1, devices=jax.devices()[:2])


def make_rows(num_rows=1_000, seed=0):
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(20, DIM))[rng.integers(20, size=num_rows)]
  return (centers + 0.2 * rng.normal(size=centers.shape)).astype(np.float32)


def write(folder, x, cuts=(), keys=None, order=None):
  """Rows in files cut at `cuts`, those in `order`; with keys where given."""
  folder.mkdir()
  shards, metadata = [], []
  parts = np.split(np.arange(len(x)), cuts)
  for i in order or range(len(parts)):
    path = folder / f'{i}.npy'
    np.save(path, x[parts[i]])
    shards.append(row_files.Npy(str(path)))
    metadata.append(None)
    if keys is not None:
      metadata[-1] = str(path.with_suffix('.parquet'))
      pq.write_table(pa.table({'key': keys[parts[i]]}), metadata[-1])
  return row_files.Sharded(shards, metadata)


def make_config(**fields):
  config = config_lib.default()
  fields = dict(num_centers=20, iterations=4, num_labels=5) | fields
  config.cluster.update(fields)
  return config


def run(rows, folder, mesh, **fields):
  config = make_config(**fields)
  cluster.run(config, rows, folder, mesh)
  centers = np.load(folder / 'centers.npy')
  return centers, json.loads((folder / 'clustering.json').read_text())


def test_start_and_held_out_do_not_depend_on_the_files(tmp_path):
  x = make_rows()
  keys = np.array([f'image {i}' for i in range(len(x))])
  config = make_config()
  chosen = []
  for name, cuts, order in (
    ('a', (300, 650), None),
    ('b', (300, 650), [2, 0, 1]),
    ('c', (10, 900), [1, 2, 0]),
  ):
    rows = write(tmp_path / name, x, cuts, keys, order)
    found = cluster._choose(rows, config)
    assert len(found.held_out) == 10
    assert not set(found.held_out) & set(found.first)
    all_keys = rows.keys()
    chosen.append((all_keys[found.first], set(all_keys[found.held_out])))
    first = cluster._start(
      config, rows, cluster.Training(rows, found.held_out), found, None
    ).fit.centers
    numbers = [int(k.split()[1]) for k in all_keys[found.first[:20]]]
    np.testing.assert_array_equal(first, x[numbers])
  for found in chosen[1:]:
    np.testing.assert_array_equal(found[0], chosen[0][0])
    assert found[1] == chosen[0][1]
  config.seed = 1
  other = cluster._choose(rows, config)
  assert set(all_keys[other.first]) != set(chosen[0][0])


def test_without_keys_the_files_names_and_places_choose(tmp_path):
  x = make_rows()
  a = write(tmp_path / 'a', x, (300, 650))
  b = write(tmp_path / 'b', x, (300, 650), order=[1, 2, 0])
  first = [
    rows.take(cluster._choose(rows, make_config()).first) for rows in (a, b)
  ]
  np.testing.assert_array_equal(*first)


def test_row_numbers_are_spread_evenly(tmp_path):
  keys = np.array([f'{i:09d}' for i in range(20_000)] + ['a' * 30, 'é'])
  rows = write(tmp_path / 'a', np.ones((len(keys), 1), np.float32), (), keys)
  hashes = cluster.row_hashes(rows, 0)
  assert len(set(hashes)) == len(hashes)
  counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
  assert np.abs(counts - 1_250).max() < 5 * 1_250**0.5
  assert abs(np.corrcoef(hashes, np.arange(len(hashes)))[0, 1]) < 0.03


def test_training_leaves_out_what_is_held_out():
  x = make_rows(50)
  held_out = np.array([0, 1, 7, 30, 49])
  rows = cluster.Training(x, held_out)
  expected = np.delete(x, held_out, 0)
  assert rows.shape == expected.shape
  for start in range(46):
    assert rows.row(start if start < 45 else 0) not in held_out
    for stop in range(start, 46):
      np.testing.assert_array_equal(rows[start:stop], expected[start:stop])


def test_figures(tmp_path, mesh):
  x = make_rows(2_000)
  x[1_000:1_040] = x[0]  # Forty copies.
  rows = write(tmp_path / 'x', x, (1_200,))
  centers, figures = run(rows, tmp_path / 'clusters', mesh)
  chosen = cluster._choose(rows, make_config())
  assert figures['held_out_rows'] == 20
  assert sum(map(int, [figures['num_points']])) == 2_000
  assert len(figures['objective']) == len(figures['relabelled']) == 4
  assert len(figures['held_out_objective']) == 5
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  held_out = unit[chosen.held_out]
  assert figures['held_out_objective'][-1] == pytest.approx(
    (held_out @ centers.T).max(1).mean(), abs=1e-5
  )
  first = unit[chosen.first[:20]]
  assert figures['held_out_objective'][0] == pytest.approx(
    (held_out @ first.T).max(1).mean(), abs=1e-5
  )
  assert 0 < figures['relabelled'][0] <= 1
  assert figures['objective'][-1] > figures['objective'][0]
  assert set(figures['size_percentiles']) == {
    '0', '1', '10', '50', '90', '99', '100'
  }  # fmt: skip
  assert figures['imbalance'] >= 1


def test_bad_rows_are_named_by_file_and_row(tmp_path, mesh, caplog):
  x = make_rows()
  bad = write(tmp_path / 'x', x, (400,))
  chosen = cluster._choose(bad, make_config())
  spoilt = [chosen.first[0], chosen.held_out[0], 999, 2]
  for i, value in zip(spoilt, (0, np.nan, np.inf, -np.inf)):
    x[i] = value
  rows = write(tmp_path / 'y', x, (400,))
  with caplog.at_level(logging.WARNING):
    centers, figures = run(rows, tmp_path / 'clusters', mesh)
  assert figures['skipped_rows'] == 4
  assert np.isfinite(centers).all()
  for row in spoilt:
    name, place = (f'0.npy row {row}', row) if row < 400 else (
      f'1.npy row {row - 400}', row
    )  # fmt: skip
    assert name in caplog.text, place


def test_two_levels_then_flat(tmp_path, mesh):
  rows = write(tmp_path / 'x', make_rows(2_000), (1_200,))
  _, figures = run(
    rows, tmp_path / 'clusters', mesh, levels=(4, 5), repair_iterations=3
  )
  assert len(figures['coarse_objective']) == 4
  assert len(figures['objective']) == 3
  before, after = figures['cells_objective']
  assert before < after <= figures['objective'][0] + 1e-3
  assert figures['objective'][-1] >= figures['objective'][0]


def test_two_levels_are_made_once(tmp_path, mesh, monkeypatch):
  rows = write(tmp_path / 'x', make_rows())
  expected, figures = run(rows, tmp_path / 'a', mesh, levels=(4, 5))
  fit = cluster.kmeans.fit

  def killed(data, num_centers, **options):
    if num_centers == 20:
      raise KeyboardInterrupt
    return fit(data, num_centers, **options)

  with monkeypatch.context() as patched:
    patched.setattr(cluster.kmeans, 'fit', killed)
    with pytest.raises(KeyboardInterrupt):
      run(rows, tmp_path / 'b', mesh, levels=(4, 5))
  monkeypatch.setattr(hierarchy, 'fit', None)
  found, again = run(rows, tmp_path / 'b', mesh, levels=(4, 5))
  np.testing.assert_array_equal(found, expected)
  assert again == figures


@pytest.mark.parametrize('num_rows', [19, 20, 21, 150])
def test_few_rows(tmp_path, mesh, num_rows):
  rows = write(tmp_path / 'x', make_rows(num_rows))
  if num_rows < 20:
    with pytest.raises(errors.UserError, match='20 centers need'):
      run(rows, tmp_path / 'clusters', mesh)
    assert not (tmp_path / 'clusters').exists()
    return
  centers, figures = run(rows, tmp_path / 'clusters', mesh)
  assert np.isfinite(centers).all()
  assert len(figures['held_out_objective']) == (5 if num_rows >= 100 else 0)


def test_copies_and_constant_rows(tmp_path, mesh):
  for name, x in (
    ('copies', np.repeat(np.eye(DIM, dtype=np.float32), 50, axis=0)),
    ('constant', np.ones((400, DIM), np.float32)),
  ):
    rows = write(tmp_path / name, x)
    centers, figures = run(rows, tmp_path / f'{name}_clusters', mesh)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    assert figures['objective'][-1] == pytest.approx(1, abs=1e-5)
    assert figures['near_duplicate_centers'] > 10
