"""k-means in two levels, for more centers than one machine can afford.

The rows are clustered into coarse centers first. Then each coarse cell is
clustered by itself, into centers in proportion to its size. A pass costs
N (K1 + K2) D instead of N K1 K2 D. A row near the border of a cell may be
nearer to a center of the next cell; flat passes of `kmeans.fit` from these
centers repair that.

Shapes: N rows, K1 coarse centers, K centers, D dimensions, T rows a tile; n
rows and k centers of a cell, padded.
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

# Rows of a score tile, whose scores stay in the cache with 1,000 centers.
_TILE = 256

# A cell and its centers are padded at least to these, and then to one of few
# sizes, so that few programs compile.
_MIN_ROWS = 512
_MIN_CENTERS = 16

# Rows read at once: 96 MiB with 768 dimensions in float32.
_CHUNK = 32_768

# Share of this machine's memory that the rows of cells may take.
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
  """Clusters in two levels.

  Args:
    rows: [N, D]; they need not be unit rows.
    levels: K1, and the mean number of centers of a cell; K is their product.
    sample: rows [M, D], M >= K1, among which k-means++ chooses the first coarse
      centers.
    iterations: passes of each level.
    seed: chooses both levels' first centers.
    mesh: of all devices, on one host.

  Returns:
    Centers [K, D]; and as JSON values the objectives of the coarse passes, the
    objectives before and after the cells were clustered, and the fewest and
    most centers of a cell.

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
  """Chooses centers by k-means++ (Arthur and Vassilvitskii, 2007).

  Each is drawn in proportion to its squared distance to the nearest before it.

  Args:
    sample: unit rows [M, D].
    num_centers: at most M.
    seed: of the draws.

  Returns:
    Rows of the sample [num_centers, D].
  """
  rng = np.random.default_rng(seed)
  chosen = [int(rng.integers(len(sample)))]
  distance = np.full(len(sample), np.inf)
  while len(chosen) < num_centers:
    cosine = sample @ sample[chosen[-1]]
    distance = np.minimum(distance, np.maximum(1 - cosine, 0))
    distance[chosen[-1]] = 0
    total = distance.sum(dtype=np.float64)
    # If all that are left are copies of centers, any will do.
    p = distance / total if total > 0 else None
    chosen.append(int(rng.choice(len(sample), p=p)))
  return sample[chosen]


def in_proportion(sizes: np.ndarray, total: int) -> np.ndarray:
  """Divides `total` in proportion to sizes, by the largest remainder.

  Args:
    sizes: integers [K1], whose sum is at least `total`.
    total: sum of the result.

  Returns:
    int64 [K1], none above its size.
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
  """Returns all cells' centers [K, D], and the sum of the cosines to them."""
  ends = np.cumsum(counts)
  centers = np.zeros((ends[-1], rows.shape[1]), np.float32)
  devices = jax.local_devices()
  total, running = 0.0, []

  def collect() -> float:
    cell, c_kD, cosine_sum = running.pop(0)
    centers[ends[cell] - counts[cell] : ends[cell]] = c_kD[: counts[cell]]
    return float(cosine_sum)

  for i, (cell, x_nD) in enumerate(_cells(rows, cells, counts)):
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
    if len(running) > len(devices):  # Each device has its cell.
      total += collect()
  while running:
    total += collect()
  return centers, total


def _cells(
  rows: unit.Rows, cells: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields each cell that has centers, and its unit rows.

  All rows are read once for as many cells as fit in a share of the memory.
  """
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  sizes = np.bincount(cells[cells >= 0], minlength=len(counts))
  for group in _groups(
    np.flatnonzero(counts), sizes * rows.shape[1] * 4, memory * _MEMORY_SHARE
  ):
    # The last is for cell -1, which holds the bad rows.
    wanted = np.zeros(len(counts) + 1, bool)
    wanted[group] = True
    members = np.flatnonzero(wanted[cells])
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
  """Cuts cells into groups of at most so many bytes, or of one cell."""
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
  """Adds zero rows up to one of few lengths.

  The lengths are `length` times a power of two, and the middles between two.
  """
  while length < len(x):
    length += length // 2 if length & (length - 1) == 0 else length // 3
  return np.pad(x, [(0, length - len(x)), (0, 0)])


@functools.partial(jax.jit, static_argnames='iterations')
def _lloyd(
  x_nD: jax.Array, c_kD: jax.Array, count: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
  """Returns one cell's centers, and the sum of its rows' cosines to them.

  Rows that are zero are padding, and so are centers from `count` on.
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
    # A center without rows stays; the flat passes restart it.
    return jnp.where(norm_k1 > 0, sums_kD / jnp.maximum(norm_k1, 1e-30), c_kD)

  c_kD = lax.fori_loop(0, iterations, iterate, c_kD)
  return c_kD, assign(c_kD)[1]
