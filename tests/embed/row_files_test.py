"""Files of rows as one array: single rows out of many."""

import numpy as np
import pytest

from mlcd_jax.embed import row_files
from mlcd_jax.runtime import errors
from tests import row_shards


@pytest.mark.parametrize('at_once', [1, 7, 10_000])
def test_single_rows_are_read_in_few_spans(tmp_path, at_once):
  x = row_shards.make_rows(500)
  rows = row_shards.write(tmp_path / 'x', x, (100, 100, 333))
  rng = np.random.default_rng(0)
  for count in (0, 1, 40, 500):
    wanted = rng.choice(500, count)
    np.testing.assert_array_equal(rows.take(wanted, at_once), x[wanted])


def test_files_of_two_types_are_read_as_the_wider(tmp_path):
  x = row_shards.make_rows(10)
  paths = [tmp_path / 'a.npy', tmp_path / 'b.npy']
  for path, part in zip(paths, (x[:4].astype(np.float16), x[4:])):
    np.save(path, part)
  rows = row_files.Sharded([row_files.Npy(str(p)) for p in paths], [None] * 2)
  assert rows[0:3].dtype == rows[2:7].dtype == np.float32
  np.testing.assert_array_equal(rows[4:10], x[4:])


def test_files_that_become_shorter_are_named(tmp_path):
  path = tmp_path / 'a.npy'
  np.save(path, row_shards.make_rows(10))
  rows = row_files.Npy(str(path))
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(errors.RunError, match='a.npy: shorter'):
    rows.read(5, 10)
