"""k-means in two levels, for more centers than flat passes can afford.

First, all rows are clustered into K1 coarse centers. The rows of one coarse
center are a cell. Then each cell is clustered by itself, into a number of
centers in proportion to its rows, K2 on average. One pass of each level takes
N (K1 + K2) D multiplications in all, where a flat pass takes N K1 K2 D.

A row near the border of its cell may be nearer to a center of the next cell.
Flat passes of `kmeans.fit` that start from these centers repair that.

Shapes: N rows, M sampled rows, K1 coarse centers, K centers in all, D
dimensions, T rows of a tile; n rows and k centers of a cell, both padded.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import unit
from mlcd_jax.kmeans import lloyd
from mlcd_jax.kmeans import nearest

# Rows of a score tile. With 1,000 centers its scores take 1 MB and stay in the
# cache.
_TILE = 256

# The smallest sizes to which the rows and the centers of a cell are padded.
# `_padded` has the larger ones. They are few, so that few programs compile, and
# sizes of rows are multiples of _TILE.
_MIN_ROWS = 512
_MIN_CENTERS = 16

# Rows that are read at once: 96 MiB with 768 dimensions in float32.
_CHUNK = 32_768

# The share of this machine's memory that the rows of cells may take.
_MEMORY_SHARE = 1 / 8


def fit(
  rows: unit.Rows,
  levels: tuple[int, int],
  *,
  sample: np.ndarray,
  iterations: int,
  seed: int,
  mesh: Mesh,
) -> tuple[np.ndarray, dict[str, Any]]:
  """Clusters rows in two levels.

  Args:
    rows: the rows [N, D]; they need not be unit rows.
    levels: the numbers K1 and K2; K is their product.
    sample: rows [M, D], M >= K1. k-means++ chooses the first coarse centers
      among them.
    iterations: the number of passes of each level.
    seed: the seed that chooses the first centers of both levels.
    mesh: the mesh of all devices, which must be on one host.

  Returns:
    The centers [K, D], and a report of JSON values:
      coarse_objective: the mean cosine to the coarse centers in each pass.
      cells_objective: the mean cosine before and after clustering the cells.
      cell_centers: the smallest and the largest number of centers of a cell.

  Raises:
    ValueError: there are fewer usable rows than centers.
  """
  coarse = lloyd.fit(
    rows,
    levels[0],
    iterations=iterations,
    init=plus_plus(unit.unit_rows(sample), levels[0], seed),
    mesh=mesh,
  )
  cells, cosines = nearest.nearest_centers(rows, coarse.centers, 1, mesh=mesh)
  # A row that is zero or not finite has the cosine 0 to every center.
  cells = np.where(cosines[:, 0] == 0, -1, cells[:, 0])
  sizes = np.bincount(cells[cells >= 0], minlength=levels[0])
  num_centers = levels[0] * levels[1]
  if num_centers > sizes.sum():
    raise ValueError(
      f'{num_centers} centers need as many rows; there are {sizes.sum()} of '
      f'{len(cells)} that are finite and not zero'
    )
  counts = in_proportion(sizes, num_centers)
  centers, total = _fit_cells(rows, cells, counts, iterations, seed)
  return centers, {
    'coarse_objective': coarse.objective,
    'cells_objective': [
      float(cosines.sum(dtype=np.float64) / sizes.sum()),
      total / sizes[counts > 0].sum(),
    ],
    'cell_centers': [int(counts.min()), int(counts.max())],
  }


def plus_plus(sample: np.ndarray, num_centers: int, seed: int) -> np.ndarray:
  """Chooses first centers by k-means++ (Arthur and Vassilvitskii, 2007).

  The first center is a random row. Each further one is drawn among the rows
  with a probability in proportion to the squared distance between the row and
  the nearest center drawn so far.

  Args:
    sample: unit rows [M, D].
    num_centers: the number of centers, at most M.
    seed: the seed of the draws.

  Returns:
    Rows of the sample [num_centers, D].
  """
  rng = np.random.default_rng(seed)
  chosen = [int(rng.integers(len(sample)))]
  distance = np.full(len(sample), np.inf)
  while len(chosen) < num_centers:
    # The squared distance of unit rows is 2 (1 - cosine); the 2 cancels below.
    cosine = sample @ sample[chosen[-1]]
    distance = np.minimum(distance, np.maximum(1 - cosine, 0))
    distance[chosen[-1]] = 0
    total = distance.sum(dtype=np.float64)
    # If only copies of chosen centers are left, any row will do.
    p = distance / total if total > 0 else None
    chosen.append(int(rng.choice(len(sample), p=p)))
  return sample[chosen]


def in_proportion(sizes: np.ndarray, total: int) -> np.ndarray:
  """Divides a number in proportion to sizes.

  Each share is rounded down. What is left goes one by one to the shares that
  lost the largest fractions (the method of largest remainders).

  Args:
    sizes: integers [K1], whose sum is at least `total`.
    total: the number to divide.

  Returns:
    The shares, int64 [K1]. They sum to `total`, and none is above its size.
  """
  scaled = sizes.astype(np.int64) * total  # Exact, unlike a quotient.
  whole, remainder = np.divmod(scaled, sizes.sum())
  most = np.argsort(-remainder, kind='stable')[: total - whole.sum()]
  whole[most] += 1
  return whole


def _fit_cells(
  rows: unit.Rows,
  cells: np.ndarray,
  counts: np.ndarray,
  iterations: int,
  seed: int,
) -> tuple[np.ndarray, float]:
  """Clusters each cell by itself.

  Args:
    rows: the rows [N, D].
    cells: the cell of each row [N], -1 for bad rows.
    counts: the number of centers of each cell [K1].
    iterations: the number of passes over each cell.
    seed: the seed that chooses the first centers.

  Returns:
    The centers of all cells [K, D], in the order of the cells, and the sum of
    the cosines to them. Rows of cells without centers are left out of the sum.
  """
  ends = np.cumsum(counts)
  centers = np.zeros((ends[-1], rows.shape[1]), np.float32)
  devices = jax.local_devices()
  total, running = 0.0, []

  def collect() -> float:
    cell, c_kD, cosine_sum = running.pop(0)
    centers[ends[cell] - counts[cell] : ends[cell]] = c_kD[: counts[cell]]
    return float(cosine_sum)

  for i, (cell, x_nD) in enumerate(_cells(rows, cells, counts)):
    # A generator of its own makes a cell independent of the others.
    rng = np.random.default_rng((seed, cell))
    first = rng.choice(len(x_nD), counts[cell], replace=False)
    arguments = (
      _padded(x_nD, _MIN_ROWS),
      _padded(x_nD[np.sort(first)], _MIN_CENTERS),
    )
    c_kD, cosine_sum = _lloyd(
      *jax.device_put(arguments, devices[i % len(devices)]),
      counts[cell],
      iterations,
    )
    running.append((cell, c_kD, cosine_sum))
    # Waits for the oldest cell only when each device has another one to do.
    if len(running) > len(devices):
      total += collect()
  while running:
    total += collect()
  return centers, total


def _cells(
  rows: unit.Rows, cells: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields each cell that has centers, as its number and its unit rows.

  It collects as many cells at a time as fit in a share of the memory, and reads
  all rows once for each such group of cells.

  Args:
    rows: the rows [N, D].
    cells: the cell of each row [N], -1 for bad rows.
    counts: the number of centers of each cell [K1].
  """
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  sizes = np.bincount(cells[cells >= 0], minlength=len(counts))
  for group in _groups(
    np.flatnonzero(counts), sizes * rows.shape[1] * 4, memory * _MEMORY_SHARE
  ):
    # The bad rows have the cell -1, which is the last place: it stays False.
    wanted = np.zeros(len(counts) + 1, bool)
    wanted[group] = True
    members = np.flatnonzero(wanted[cells])
    # The place of each row in `held`, where the rows of a cell lie together.
    place = np.empty(len(members), np.int64)
    place[np.argsort(cells[members], kind='stable')] = np.arange(len(members))
    held = np.empty((len(members), rows.shape[1]), np.float32)
    for start in range(0, rows.shape[0], _CHUNK):
      a, b = np.searchsorted(members, (start, start + _CHUNK))
      if a < b:
        chunk = np.asarray(rows[start : start + _CHUNK])
        held[place[a:b]] = unit.unit_rows(chunk[members[a:b] - start])
    ends = np.cumsum(sizes[group])
    for cell, end in zip(group, ends):
      yield cell, held[end - sizes[cell] : end]


def _groups(
  cells: np.ndarray, num_bytes: np.ndarray, limit: float
) -> Iterator[Sequence[int]]:
  """Yields groups of cells that fit in memory together.

  Args:
    cells: the numbers of the cells.
    num_bytes: the bytes of every cell [K1].
    limit: the most bytes of a group. A cell with more is a group of its own.
  """
  group, size = [], 0
  for cell in cells.tolist():
    if group and size + num_bytes[cell] > limit:
      yield group
      group, size = [], 0
    group.append(cell)
    size += num_bytes[cell]
  if group:
    yield group


def _padded(x: np.ndarray, length: int) -> np.ndarray:
  """Pads an array with zero rows to one of a few lengths.

  The lengths are `length` times 1, 1.5, 2, 3, 4, 6, 8 and so on.

  Args:
    x: the array [n, ...].
    length: the smallest length, a power of two.
  """
  while length < len(x):
    length += length // 2 if length & (length - 1) == 0 else length // 3
  return np.pad(x, [(0, length - len(x)), (0, 0)])


@functools.partial(jax.jit, static_argnames='iterations')
def _lloyd(
  x_nD: jax.Array, c_kD: jax.Array, count: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
  """Clusters one cell.

  Args:
    x_nD: the unit rows of the cell; zero rows are padding.
    c_kD: the first centers; those from `count` on are padding.
    count: the number of centers.
    iterations: the number of passes.

  Returns:
    The centers [k, D], and the sum of the cosines of all rows to them.
  """
  k, dim = c_kD.shape
  used_k1 = (jnp.arange(k) < count)[:, None]
  x_tiles = x_nD.reshape(-1, _TILE, dim)

  def assign(c_kD):
    def tile(carry, x_TD):
      sums_kD, total = carry
      s_kT = jnp.where(used_k1, c_kD @ x_TD.T, -jnp.inf)
      usable_T = jnp.any(x_TD != 0, axis=1)
      center_T = jnp.where(usable_T, jnp.argmax(s_kT, axis=0), k)
      total += jnp.sum(jnp.where(usable_T, jnp.max(s_kT, axis=0), 0))
      return (sums_kD.at[center_T].add(x_TD, mode='drop'), total), None

    zero = (jnp.zeros_like(c_kD), jnp.zeros((), jnp.float32))
    return lax.scan(tile, zero, x_tiles)[0]

  def iterate(_, c_kD):
    sums_kD, _ = assign(c_kD)
    norm_k1 = jnp.linalg.norm(sums_kD, axis=1, keepdims=True)
    # A center without rows does not move. The flat passes restart it.
    return jnp.where(norm_k1 > 0, sums_kD / jnp.maximum(norm_k1, 1e-30), c_kD)

  c_kD = lax.fori_loop(0, iterations, iterate, c_kD)
  return c_kD, assign(c_kD)[1]
