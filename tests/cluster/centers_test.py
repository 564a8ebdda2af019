"""The cluster stage: what it reports, bad rows, two levels, few rows."""

import json
import logging

import jax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax.cluster import centers as centers_lib
from mlcd_jax.cluster import split
from mlcd_jax.runtime import errors
from tests import row_shards


@pytest.fixture(name='mesh')
def fixture_mesh():
  return sharding.make_mesh(2, 1, devices=jax.devices()[:2])


def make_config(**fields):
  config = config_lib.default()
  fields = dict(num_centers=20, iterations=4, num_labels=5) | fields
  config.cluster.update(fields)
  return config


def run(rows, folder, mesh, **fields):
  config = make_config(**fields)
  centers_lib.run(config, rows, folder, mesh)
  centers = np.load(folder / 'centers.npy')
  return centers, json.loads((folder / 'clustering.json').read_text())


def test_figures(tmp_path, mesh):
  x = row_shards.make_rows(2_000)
  x[1_000:1_040] = x[0]  # Forty copies.
  rows = row_shards.write(tmp_path / 'x', x, (1_200,))
  centers, figures = run(rows, tmp_path / 'clusters', mesh)
  chosen = split.choose(rows, make_config())
  assert figures['held_out_rows'] == 20
  assert figures['num_points'] == 2_000
  assert len(figures['objective']) == len(figures['relabelled']) == 4
  assert len(figures['held_out_objective']) == 5
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  measured = unit[chosen.held_out]
  assert figures['held_out_objective'][-1] == pytest.approx(
    (measured @ centers.T).max(1).mean(), abs=1e-5
  )
  first = unit[chosen.first[:20]]
  assert figures['held_out_objective'][0] == pytest.approx(
    (measured @ first.T).max(1).mean(), abs=1e-5
  )
  assert 0 < figures['relabelled'][0] <= 1
  assert figures['objective'][-1] > figures['objective'][0]
  assert set(figures['size_percentiles']) == {
    '0', '1', '10', '50', '90', '99', '100'
  }  # fmt: skip
  assert figures['imbalance'] >= 1


def test_bad_rows_are_named_by_file_and_row(tmp_path, mesh, caplog):
  x = row_shards.make_rows()
  bad = row_shards.write(tmp_path / 'x', x, (500,))
  chosen = split.choose(bad, make_config())
  spoilt = [chosen.first[0], chosen.held_out[0], 999, 2]
  for i, value in zip(spoilt, (0, np.nan, np.inf, -np.inf)):
    x[i] = value
  rows = row_shards.write(tmp_path / 'y', x, (500,))
  with caplog.at_level(logging.WARNING):
    centers, figures = run(rows, tmp_path / 'clusters', mesh)
  assert figures['skipped_rows'] == 4
  assert np.isfinite(centers).all()
  for row in spoilt:
    name = f'{row // 500}.npy row {row % 500}'
    assert name in caplog.text


def test_two_levels_then_flat(tmp_path, mesh):
  rows = row_shards.write(tmp_path / 'x', row_shards.make_rows(2_000), (1_200,))
  _, figures = run(
    rows, tmp_path / 'clusters', mesh, levels=(4, 5), repair_iterations=3
  )
  assert len(figures['coarse_objective']) == 4
  assert len(figures['objective']) == 3
  before, after = figures['cells_objective']
  assert before < after <= figures['objective'][0] + 1e-3
  assert figures['objective'][-1] >= figures['objective'][0]


def test_two_levels_are_made_once(tmp_path, mesh, monkeypatch):
  rows = row_shards.write(tmp_path / 'x', row_shards.make_rows())
  expected, figures = run(rows, tmp_path / 'a', mesh, levels=(4, 5))

  def killed(*args, **options):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(kmeans, 'iterate', killed)
    with pytest.raises(KeyboardInterrupt):
      run(rows, tmp_path / 'b', mesh, levels=(4, 5))
  monkeypatch.setattr(kmeans.two_level, 'fit', None)
  found, again = run(rows, tmp_path / 'b', mesh, levels=(4, 5))
  np.testing.assert_array_equal(found, expected)
  assert again == figures


@pytest.mark.parametrize('num_rows', [19, 20, 21, 150])
def test_few_rows(tmp_path, mesh, num_rows):
  rows = row_shards.write(tmp_path / 'x', row_shards.make_rows(num_rows))
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
    ('copies', np.repeat(np.eye(row_shards.DIM, dtype=np.float32), 50, axis=0)),
    ('constant', np.ones((400, row_shards.DIM), np.float32)),
  ):
    rows = row_shards.write(tmp_path / name, x)
    centers, figures = run(rows, tmp_path / f'{name}_clusters', mesh)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    assert figures['objective'][-1] == pytest.approx(1, abs=1e-5)
    assert figures['near_duplicate_centers'] > 10


def test_a_state_of_an_earlier_version_is_refused(tmp_path, mesh):
  rows = row_shards.write(tmp_path / 'x', row_shards.make_rows())
  folder = tmp_path / 'clusters'
  folder.mkdir()
  np.savez(folder / 'unfinished.npz', fit_centers=np.zeros((20, 4)))
  with pytest.raises(errors.UserError, match='earlier version; delete it'):
    run(rows, folder, mesh)
