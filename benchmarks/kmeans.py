"""Whole spherical k-means runs, and 8 labels a row, against peers.

  pip install -r requirements-bench.txt
  python benchmarks/kmeans.py [--shapes=100000x512x1000] [--noise=0.75,1.5]
  python benchmarks/kmeans.py --data=digits
  python benchmarks/kmeans.py --nearest

Every method clusters the same rows in the same number of iterations, without
subsampling, with its default threads; from a numpy array to numpy centers. The
methods take turns in one process, each round has another start, and a ratio is
the median over the rounds of a peer's seconds divided by ours. faiss.Kmeans,
scikit-learn and mlcd_jax get the same first centers; superkmeans and
faiss.SuperKmeans take only a seed. mlcd_jax has run once from each start
before, so that compilation is not timed. `--nearest` times the 8 nearest
centers beside faiss's, and matching pursuit, which no peer has, beside these.

The peers are at their best: on AMD's Zen 4 and 5 the OpenBLAS in faiss's wheel
falls to a slow kernel unless OPENBLAS_CORETYPE is SkylakeX. The kernel in use
and numpy's speed are printed first, so that a handicap shows.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import openblas

openblas.set_core_type()

# ruff: noqa: E402
import faiss
import numpy as np
import sklearn.cluster
import superkmeans
import threadpoolctl

from mlcd_jax import kmeans
from mlcd_jax.embed import embedders

# Rows, dimensions, centers: and iterations.
_SHAPES = {
  '100000x512x1000': 10,
  '24576x768x4096': 8,
  '65536x768x16384': 8,
}
_NUM_LABELS = 8


def main() -> None:
  """Takes turns, prints a table for each shape and kind of data."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--shapes', type=_shapes, default=','.join(_SHAPES))
  parser.add_argument(
    '--noise', type=_numbers, default='0.75,1.5', help='tight, loose'
  )
  parser.add_argument('--data', choices=('made', 'digits'), default='made')
  parser.add_argument('--peers', type=_peers, default=','.join(_PEERS))
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--nearest', action='store_true', help='8 labels a row')
  args = parser.parse_args()
  _print_machine()
  if args.nearest:
    _nearest(args.rounds)
    return
  if args.data == 'digits':
    rows = digits()
    _whole_runs('digits, HOG', rows, 500, 10, args.peers, args.rounds)
    return
  for num_rows, dim, num_centers in args.shapes:
    iterations = _SHAPES.get(f'{num_rows}x{dim}x{num_centers}', 8)
    for noise in args.noise:
      rows = make_rows(num_rows, dim, 2 * num_centers, noise=noise)
      name = f'noise {noise}'
      _whole_runs(name, rows, num_centers, iterations, args.peers, args.rounds)


def _shapes(text: str) -> list[tuple[int, int, int]]:
  shapes = [shape.split('x') for shape in text.split(',')]
  if not all(
    len(shape) == 3 and all(n.isdecimal() and int(n) > 0 for n in shape)
    for shape in shapes
  ):
    raise argparse.ArgumentTypeError(f'{text}: say ROWSxDIMENSIONSxCENTERS')
  return [tuple(map(int, shape)) for shape in shapes]


def _numbers(text: str) -> list[float]:
  try:
    return [float(number) for number in text.split(',')]
  except ValueError as e:
    raise argparse.ArgumentTypeError(f'{text}: say numbers') from e


def _peers(text: str) -> list[str]:
  peers = text.split(',')
  for peer in peers:
    if peer not in _PEERS:
      known = ', '.join(_PEERS)
      raise argparse.ArgumentTypeError(f'{peer}: use any of {known}')
  return peers


def make_rows(
  num_rows: int, dim: int, num_groups: int, *, noise: float, seed: int = 0
) -> np.ndarray:
  """Unit rows in groups of groups, much like the embeddings of CLIP.

  They have a common mean, a spectrum that falls as a power, and sizes that
  differ. Twice as many groups as centers, as no data has as many as one asks.

  Args:
    num_rows: N.
    dim: D.
    num_groups: of the finer kind; each belongs to one of the coarser.
    noise: within a group, in units of what lies between groups.
    seed: of everything.

  Returns:
    float32 [N, D].
  """
  rng = np.random.default_rng(seed)

  def normal(count):
    return rng.standard_normal((count, dim), np.float32) * spectrum

  spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.35
  spectrum /= np.linalg.norm(spectrum)
  mean = rng.standard_normal(dim, np.float32)
  mean *= 0.6 / np.linalg.norm(mean)
  coarse = normal(max(8, num_groups // 32))
  coarse_of = rng.integers(0, len(coarse), num_groups)
  groups = 0.7 * (coarse[coarse_of] + normal(num_groups))
  sizes = rng.zipf(1.6, num_groups).clip(1, 50).astype(float)
  group_of = rng.choice(num_groups, num_rows, p=sizes / sizes.sum())
  rows = mean + groups[group_of] + noise * normal(num_rows)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def digits() -> np.ndarray:
  """The HOG embeddings of the 3,500 training digits, as `embed` makes them."""
  from mlcd_jax import config as config_lib
  from mlcd_jax.data import sources
  from mlcd_jax.data import transforms

  source = sources.make(config_lib.default().data)
  prepare = embedders.Hog(28).prepare
  images = np.stack(
    [prepare(transforms.decode(source[i]['image'])) for i in range(len(source))]
  )
  features = embedders.Hog(28).features(images)
  return embedders.Hog(28, features.mean(0))(images)


def _print_machine() -> None:
  size = 4096
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, size, size), np.float32)
  seconds = [_seconds(lambda: a @ b)[0] for _ in range(4)][1:]
  print(
    f'{os.cpu_count()} cores; OPENBLAS_CORETYPE='
    f'{os.environ.get("OPENBLAS_CORETYPE", "unset")}; numpy sgemm '
    f'{2 * size**3 / statistics.median(seconds) / 1e9:.0f} GFLOP/s'
  )
  for library in threadpoolctl.threadpool_info():
    if library['internal_api'] == 'openblas':
      print(
        f'  {pathlib.Path(library["filepath"]).name}: '
        f'{library["architecture"]}, {library["num_threads"]} threads'
      )


def _seconds(run, *args):
  start = time.perf_counter()
  found = run(*args)
  return time.perf_counter() - start, found


def _mlcd_jax(rows, first, iterations, seed):
  return kmeans.fit(rows, len(first), iterations=iterations, init=first).centers


def _faiss(rows, first, iterations, seed):
  model = faiss.Kmeans(
    rows.shape[1],
    len(first),
    niter=iterations,
    spherical=True,
    min_points_per_centroid=1,
    max_points_per_centroid=len(rows),
  )
  model.train(rows, init_centroids=first)
  return model.centroids


def _faiss_superkmeans(rows, first, iterations, seed):
  """It knows the Euclidean distance only."""
  model = faiss.SuperKmeans(
    rows.shape[1],
    len(first),
    niter=iterations,
    seed=seed,
    min_points_per_centroid=1,
    max_points_per_centroid=len(rows),
  )
  model.train(rows)
  return model.centroids


def _superkmeans(rows, first, iterations, seed):
  model = superkmeans.SuperKMeans(
    len(first),
    rows.shape[1],
    hierarchical=False,
    iters=iterations,
    sampling_fraction=1.0,
    max_points_per_cluster=len(rows),
    early_termination=False,
    angular=True,
    seed=seed,
  )
  return np.asarray(model.train(rows))


def _sklearn(rows, first, iterations, seed):
  """Lloyd of the Euclidean distance."""
  model = sklearn.cluster.KMeans(
    len(first), init=first, n_init=1, max_iter=iterations, tol=0
  )
  return model.fit(rows).cluster_centers_


_PEERS = {
  'superkmeans': _superkmeans,
  'faiss.Kmeans': _faiss,
  'faiss.SuperKmeans': _faiss_superkmeans,
  'scikit-learn': _sklearn,
}


def _whole_runs(name, rows, num_centers, iterations, peers, rounds) -> None:
  methods = {'mlcd_jax': _mlcd_jax, **{peer: _PEERS[peer] for peer in peers}}
  firsts = [
    rows[np.random.default_rng(i).choice(len(rows), num_centers, False)]
    for i in range(rounds)
  ]
  for first in firsts:
    _mlcd_jax(rows, first, iterations, 0)
  seconds = {method: [] for method in methods}
  cosines = {method: [] for method in methods}
  for i, first in enumerate(firsts):
    for method, run in methods.items():
      taken, centers = _seconds(run, rows, first, iterations, i)
      seconds[method].append(taken)
      cosines[method].append(_mean_cosine(rows, centers))
  print(
    f'\n{name}: {len(rows):,} x {rows.shape[1]} -> {num_centers:,}, '
    f'{iterations} iterations, {rounds} rounds\n'
    '| method | s/iteration | its seconds / ours | mean cosine '
    '(- faiss.Kmeans) |\n|---|---|---|---|'
  )
  for method in methods:
    ratios = [a / b for a, b in zip(seconds[method], seconds['mlcd_jax'])]
    cosine = statistics.mean(cosines[method])
    line = (
      f'| {method} | {statistics.median(seconds[method]) / iterations:.3f} '
      f'| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})'
      f' | {cosine:.5f}'
    )
    if 'faiss.Kmeans' in cosines:
      line += f' ({cosine - statistics.mean(cosines["faiss.Kmeans"]):+.1e})'
    print(line + ' |', flush=True)


def _mean_cosine(rows: np.ndarray, centers: np.ndarray) -> float:
  """Returns the mean cosine of rows to their nearest centers, by faiss."""
  norm = np.linalg.norm(centers, axis=1, keepdims=True)
  index = faiss.IndexFlatIP(rows.shape[1])
  index.add(centers / np.maximum(norm, 1e-12))
  return float(index.search(rows, 1)[0].mean(dtype=np.float64))


def _nearest(rounds: int) -> None:
  """Times 8 labels of 4,096 rows, of 16,384 centers."""
  num_rows, num_centers = 4_096, 16_384
  made = make_rows(num_rows + 2 * num_centers, 768, 2 * num_centers, noise=0.75)
  rows, rest = made[:num_rows], made[num_rows:]
  centers = rest[np.random.default_rng(1).choice(len(rest), num_centers, False)]
  index = faiss.IndexFlatIP(768)
  index.add(centers)
  methods = {
    'IndexFlatIP.search': lambda: index.search(rows, _NUM_LABELS)[::-1],
    'nearest': lambda: kmeans.nearest_centers(rows, centers, _NUM_LABELS),
    'pursuit': lambda: kmeans.pursue(rows, centers, _NUM_LABELS),
  }
  for run in methods.values():
    run()
  seconds = {method: [] for method in methods}
  labels = {}
  for _ in range(max(5, rounds)):
    for method, run in methods.items():
      taken, (labels[method], _) = _seconds(run)
      seconds[method].append(taken)
  peer, own, pursued = seconds.values()
  expected, nearest, _ = labels.values()
  recall = (nearest[:, :, None] == expected[:, None]).any(2).mean()
  print(
    f'\n{_NUM_LABELS} labels of {num_centers:,} centers, {num_rows:,} x 768: '
    + ', '.join(f'{k} {statistics.median(v):.3f} s' for k, v in seconds.items())
    + f"; IndexFlatIP's seconds / nearest's {_ratio(peer, own)}; recall "
    f'{recall:.5f}, same order {(nearest == expected).mean():.5f}; '
    f"pursuit's seconds / nearest's {_ratio(pursued, own)}"
  )


def _ratio(seconds: list[float], others: list[float]) -> str:
  ratios = [a / b for a, b in zip(seconds, others)]
  return (
    f'{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})'
  )


if __name__ == '__main__':
  main()
