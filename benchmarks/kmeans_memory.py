"""The memory that clustering takes beside the data, which stays on disk.

  python benchmarks/kmeans_memory.py --rows=2000000 --dim=768 --centers=1000

writes float16 rows as .npy files into a temporary folder, runs the embed stage
(which looks at them) and the cluster stage (centers, labels) on them, and
prints the process's peak memory above what it had with jax's devices ready.
"""

import argparse
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax import stages
from mlcd_jax.config import presets
from mlcd_jax.runtime import errors

_FILE_ROWS = 250_000
_BLOCK_ROWS = 10_000


def write_rows(folder: pathlib.Path, num_rows: int, dim: int) -> None:
  """Writes noisy points around 500 directions, a block at a time."""
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(500, dim)).astype(np.float32)
  for start in range(0, num_rows, _FILE_ROWS):
    count = min(_FILE_ROWS, num_rows - start)
    # Not mapped: mapped pages would count as this process's memory.
    with open(folder / f'{start:09d}.npy', 'wb') as f:
      header = dict(shape=(count, dim), fortran_order=False, descr='<f2')
      np.lib.format.write_array_header_1_0(f, header)
      for i in range(0, count, _BLOCK_ROWS):
        noise = rng.standard_normal(
          (min(_BLOCK_ROWS, count - i), dim), np.float32
        )
        rows = centers[rng.integers(500, size=len(noise))] + noise
        f.write(rows.astype(np.float16).tobytes())


def peak_bytes() -> int:
  """The most memory that this process has had, on Linux.

  Not `ru_maxrss`, which starts at what the process had that started this one.
  """
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.partition('VmHWM:')[2].split()[0]) * 1_024


def cluster(folder: pathlib.Path, workdir: pathlib.Path, **fields) -> int:
  """Returns the bytes that the stages took above what there was before."""
  config = config_lib.default()
  presets.digits(config)  # Its images are not read.
  config.embed.embedder = 'precomputed'
  config.embed.path = str(folder)
  config.cluster.update(fields)
  config.train.steps = 1  # Not reached.
  jax.devices()
  before = peak_bytes()
  stages.run(config, workdir, ('embed', 'cluster'))
  return peak_bytes() - before


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=2_000_000)
  parser.add_argument('--dim', type=int, default=768)
  parser.add_argument('--centers', type=int, default=1_000)
  parser.add_argument('--iterations', type=int, default=2)
  parser.add_argument('--folder', help='where the rows go; a temporary one')
  args = parser.parse_args()
  try:
    print(json.dumps(measure(args)))
  except (errors.UserError, OSError) as error:
    parser.exit(2, f'error: {error}\n')


def measure(args: argparse.Namespace) -> dict[str, float]:
  """GiB of the data, of the process before it is read, and taken for it."""
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder = pathlib.Path(name, 'rows')
    folder.mkdir()
    write_rows(folder, args.rows, args.dim)
    data = sum(path.stat().st_size for path in folder.iterdir())
    base = jax.devices() and peak_bytes()
    taken = cluster(
      folder,
      pathlib.Path(name, 'run'),
      num_centers=args.centers,
      iterations=args.iterations,
    )
  return {
    'data_gib': round(data / 2**30, 3),
    'baseline_gib': round(base / 2**30, 3),
    'taken_gib': round(taken / 2**30, 3),
  }


if __name__ == '__main__':
  main()
