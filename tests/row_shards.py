"""Files of rows, for tests of what reads them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_jax.embed import row_files

DIM = 8


def make_rows(num_rows=1_000, seed=0):
  """Returns rows around 20 directions."""
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
