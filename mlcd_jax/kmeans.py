"""Spherical k-means on the mesh, and the nearest centers of every row.

Lloyd's algorithm on unit vectors, exact and flat: points are split over the
mesh axis "data", centers over "fsdp", and scores exist one tile at a time,
never as an [N, K] array. Tiles have a fixed shape and ties go to the lower
index, so one assignment pass gives the same labels on every mesh.

Shapes: N points, K centers, D dimensions, T points a tile, L labels a point.
Upper case is global, lower case this device's part.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding

# Rows and centers of a score tile. Mesh-independent, so that products are
# computed alike everywhere; on CPUs a tile must stay in the cache.
_CPU_TILE = (256, 512)
_ACCELERATOR_TILE = (4_096, 2_048)

# Empty clusters that can restart in one iteration.
_MAX_RESEEDED = 1_024

# Rows looked up at a time for their nearest centers.
_ROWS_PER_LOOKUP = 65_536


class Rows(Protocol):
  """An array, or files read as one: [N, D] by slices."""

  shape: tuple[int, int]

  def __getitem__(self, rows: slice) -> np.ndarray: ...


class Fit(NamedTuple):
  """A finished clustering.

  Attributes:
    centers: float32 [K, D] unit rows.
    objective: mean cosine of the points to their centers, one an iteration,
      measured before that iteration's update.
    counts: int32 [K], points of each center in the last iteration.
    reseeded: centers found empty and restarted, one number an iteration.
    skipped: rows left out because they are zero or not finite.
  """

  centers: np.ndarray
  objective: list[float]
  counts: np.ndarray
  reseeded: list[int]
  skipped: int


def fit(
  embeddings: Rows,
  num_centers: int,
  *,
  iterations: int = 25,
  seed: int = 0,
  init: np.ndarray | None = None,
  tolerance: float = 0.0,
  mesh: Mesh | None = None,
  score_dtype: jnp.dtype = jnp.bfloat16,
  progress: Callable[[int, float, int], None] | None = None,
) -> Fit:
  """Clusters rows by the cosine to their nearest center.

  Args:
    embeddings: [N, D], normalised here.
    num_centers: K.
    iterations: passes over the data.
    seed: chooses the first centers among the rows.
    init: instead of `seed`, row numbers [K] or centers [K, D].
    tolerance: stop when the objective gains less than this share; 0 = never.
    mesh: all devices, points split over them, where not given.
    score_dtype: of the products' operands; they accumulate in float32.
    progress: called with iteration, objective and reseeded centers.

  Raises:
    ValueError: more centers than usable rows, or `init` does not fit.
  """
  mesh = mesh or sharding.make_mesh()
  num_points = embeddings.shape[0]
  x_ND = _put_points(embeddings, mesh)
  usable = int(_count_usable(x_ND))
  if num_centers > usable:
    raise ValueError(
      f'{num_centers} centers need as many rows; there are {usable} of '
      f'{num_points} that are finite and not zero'
    )
  c_KD = _put_centers(_first_centers(embeddings, num_centers, seed, init), mesh)
  step = _make_iteration(mesh, num_centers, jnp.dtype(score_dtype))
  objective, reseeded = [], []
  for i in range(iterations):
    c_KD, total, counts, empty = step(c_KD, x_ND)
    objective.append(float(total) / usable)
    reseeded.append(int(empty))
    if progress:
      progress(i, objective[-1], reseeded[-1])
    if tolerance and i:
      if objective[-1] - objective[-2] < tolerance * objective[-2]:
        break
  return Fit(
    centers=_to_host(c_KD)[:num_centers],
    objective=objective,
    counts=_to_host(counts)[:num_centers],
    reseeded=reseeded,
    skipped=num_points - usable,
  )


def nearest_centers(
  embeddings: Rows,
  centers: np.ndarray,
  num_labels: int = 8,
  *,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the nearest centers of every row, exact in float32.

  Args:
    embeddings: [N, D], normalised here.
    centers: [K, D], normalised here.
    num_labels: L, at most K.
    mesh: all devices, points split over them, where not given.

  Returns:
    labels int32 [N, L], nearest first, ties to the lower index, and their
    cosines float32 [N, L].

  Raises:
    ValueError: fewer centers than labels, or widths that differ.
  """
  mesh = mesh or sharding.make_mesh()
  if num_labels > len(centers):
    raise ValueError(f'{num_labels} labels from {len(centers)} centers')
  if centers.shape[1] != embeddings.shape[1]:
    raise ValueError(
      f'rows have {embeddings.shape[1]} dimensions, centers {centers.shape[1]}'
    )
  lookup = _make_lookup(mesh, len(centers), num_labels)
  c_KD = _put_centers(_unit_rows(np.asarray(centers)), mesh)
  labels, scores = [], []
  num_points = embeddings.shape[0]
  # Every call has the same shape, so that the program compiles once.
  rows = min(_ROWS_PER_LOOKUP, _padded_points(num_points, mesh))
  for start in range(0, num_points, rows):
    stop = min(start + rows, num_points)
    x_ND = _put_points(embeddings, mesh, start=start, stop=stop, pad_to=rows)
    s, i = lookup(c_KD, x_ND)
    labels.append(_to_host(i)[: stop - start])
    scores.append(_to_host(s)[: stop - start])
  empty = np.zeros((0, num_labels))
  return (
    np.concatenate(labels or [empty]).astype(np.int32),
    np.concatenate(scores or [empty]).astype(np.float32),
  )


def _tile_shape(mesh: Mesh) -> tuple[int, int]:
  cpu = mesh.devices.flat[0].platform == 'cpu'
  return _CPU_TILE if cpu else _ACCELERATOR_TILE


def _unit_rows(rows: np.ndarray) -> np.ndarray:
  """float32 unit rows; what is not finite or zero becomes zero."""
  rows = rows.astype(np.float32)
  norm = np.sqrt(np.square(rows).sum(-1, keepdims=True))
  usable = np.isfinite(norm) & (norm > 0)
  return np.where(usable, rows / np.where(usable, norm, 1), 0)


def _first_centers(
  embeddings: Rows, num_centers: int, seed: int, init: np.ndarray | None
) -> np.ndarray:
  """Centers [K, D] before the first iteration."""
  num_points, dim = embeddings.shape
  if init is None:
    rng = np.random.default_rng(seed)
    init = rng.choice(num_points, num_centers, replace=False)
  init = np.asarray(init)
  if init.ndim == 1 and len(init) == num_centers:
    init = np.concatenate([embeddings[i : i + 1] for i in init.tolist()])
  if init.shape != (num_centers, dim):
    raise ValueError(
      f'init has shape {init.shape}; give row numbers [{num_centers}] or '
      f'centers [{num_centers}, {dim}]'
    )
  return _unit_rows(init)


def _padded_points(num_points: int, mesh: Mesh) -> int:
  tile = _tile_shape(mesh)[0] * mesh.shape['data']
  return -(-num_points // tile) * tile


def _put_points(
  embeddings: Rows,
  mesh: Mesh,
  *,
  start: int = 0,
  stop: int | None = None,
  pad_to: int | None = None,
) -> jax.Array:
  """Unit rows start:stop on the devices, padded with zero rows."""
  stop = embeddings.shape[0] if stop is None else stop
  padded = pad_to or _padded_points(stop - start, mesh)
  dim = embeddings.shape[1]

  def read(index):
    first, last, _ = index[0].indices(padded)
    rows = embeddings[start + first : min(start + last, stop)]
    out = np.zeros((last - first, dim), np.float32)
    out[: len(rows)] = _unit_rows(np.asarray(rows))
    return out

  return jax.make_array_from_callback(
    (padded, dim), NamedSharding(mesh, sharding.POINTS), read
  )


def _put_centers(centers: np.ndarray, mesh: Mesh) -> jax.Array:
  """Centers on the devices, padded with zero rows to whole tiles."""
  num_centers, dim = centers.shape
  tile = _tile_shape(mesh)[1] * mesh.shape['fsdp']
  padded = np.zeros((-(-num_centers // tile) * tile, dim), np.float32)
  padded[:num_centers] = centers
  return jax.make_array_from_callback(
    padded.shape,
    NamedSharding(mesh, sharding.CENTERS),
    lambda index: padded[index],
  )


def _to_host(x: jax.Array) -> np.ndarray:
  """The whole array on this host, from every process."""
  if not x.is_fully_addressable:
    replicated = NamedSharding(x.sharding.mesh, sharding.REPLICATED)
    x = jax.jit(lambda a: a, out_shardings=replicated)(x)
  return np.asarray(x)


@jax.jit
def _count_usable(x_ND: jax.Array) -> jax.Array:
  return jnp.sum(jnp.any(x_ND != 0, axis=1))


def _scores(c_kD, x_TD, first_center, num_centers, precision=None):
  """Cosines [k, T] with float32 accumulation; -inf for padded centers.

  Centers run down the rows, so that reducing over them is element-wise.
  """
  s_kT = lax.dot_general(
    c_kD,
    x_TD,
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  center = first_center + lax.broadcasted_iota(jnp.int32, s_kT.shape, 0)
  return jnp.where(center < num_centers, s_kT, -jnp.inf)


def _nearest(c_kD, x_nD, *, tile, num_centers):
  """Best score and center [n] among this device's centers, tile by tile."""
  tile_rows, tile_centers = tile
  k, dim = c_kD.shape
  offset = lax.axis_index('fsdp') * k
  starts = jnp.arange(0, k, tile_centers, dtype=jnp.int32)
  c_tiles = c_kD.reshape(-1, tile_centers, dim)

  def rows(x_TD):
    def centers(best, start_and_tile):
      best_score, best_center = best
      start, c_tD = start_and_tile
      s_tT = _scores(c_tD, x_TD, offset + start, num_centers)
      # Two plain reductions: argmax costs as much as the product on CPUs.
      score = jnp.max(s_tT, axis=0)
      row = lax.broadcasted_iota(jnp.int32, s_tT.shape, 0)
      first = jnp.min(jnp.where(s_tT == score[None], row, tile_centers), axis=0)
      better = score > best_score
      return (
        jnp.where(better, score, best_score),
        jnp.where(better, offset + start + first, best_center),
      ), None

    unknown = (
      jnp.full(tile_rows, -jnp.inf, jnp.float32),
      jnp.full(tile_rows, num_centers, jnp.int32),
    )
    return lax.scan(centers, unknown, (starts, c_tiles))[0]

  score, center = lax.map(rows, x_nD.reshape(-1, tile_rows, dim))
  return score.reshape(-1), center.reshape(-1)


def _merge(score, center, num_labels):
  """Best of all devices' candidates [n, l]; ties to the lower center."""

  def candidates(x):  # [n, fsdp * l], lower centers first.
    x = lax.all_gather(x, 'fsdp', axis=1)
    return x.reshape(x.shape[0], -1)

  best, place = lax.top_k(candidates(score), num_labels)
  return best, jnp.take_along_axis(candidates(center), place, axis=1)


@functools.cache
def _make_iteration(mesh: Mesh, num_centers: int, score_dtype: jnp.dtype):
  """One Lloyd iteration: centers, points -> centers, sum of cosines, ..."""
  tile = _tile_shape(mesh)

  def iteration(c_kD, x_nD):
    k = c_kD.shape[0]
    usable_n = jnp.any(x_nD != 0, axis=1)
    # Embeddings share a large mean, which would take up most of a low
    # precision's digits. Without it the order of the centers is the same.
    mean_D = _mean_of_first_tile(c_kD, tile[1], num_centers)
    score, center = _nearest(
      (c_kD - mean_D[None]).astype(score_dtype),
      x_nD.astype(score_dtype),
      tile=tile,
      num_centers=num_centers,
    )
    score, center = _merge(score[:, None], center[:, None], 1)
    score, center = score[:, 0] + x_nD @ mean_D, center[:, 0]

    # Rows of other devices' centers, and padding, fall into segment k.
    local = center - lax.axis_index('fsdp') * k
    local = jnp.where(usable_n & (local >= 0) & (local < k), local, k)
    sums_kD = jax.ops.segment_sum(x_nD, local, k + 1)[:k]
    counts_k = jax.ops.segment_sum(jnp.ones_like(local), local, k + 1)[:k]
    sums_kD, counts_k = lax.psum((sums_kD, counts_k), 'data')

    # The sum of every point's cosine to its center, in float32.
    total = lax.psum(jnp.sum(sums_kD * c_kD), 'fsdp')
    norm = jnp.sqrt(jnp.sum(jnp.square(sums_kD), axis=1, keepdims=True))
    new_kD = jnp.where(norm > 0, sums_kD / jnp.where(norm > 0, norm, 1), c_kD)
    center_k = lax.axis_index('fsdp') * k + jnp.arange(k)
    empty_k = (counts_k == 0) & (center_k < num_centers)
    num_empty = lax.psum(jnp.sum(empty_k), 'fsdp')
    new_kD = lax.cond(
      num_empty > 0,
      lambda: _reseed(new_kD, empty_k, x_nD, score, usable_n),
      lambda: new_kD,
    )
    return new_kD, total, counts_k, num_empty

  return jax.jit(
    jax.shard_map(
      iteration,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.POINTS),
      out_specs=(
        sharding.CENTERS,
        sharding.REPLICATED,
        sharding.CENTERS,
        sharding.REPLICATED,
      ),
      # Equal on all devices by construction, which types cannot show.
      check_vma=False,
    ),
    donate_argnums=0,
  )


def _mean_of_first_tile(c_kD, tile_centers, num_centers):
  """Mean [D] of the first centers, with the same bits on every mesh."""
  first = c_kD[:tile_centers]  # On the first device; padding is zero.
  mean = jnp.sum(first, axis=0) / min(tile_centers, num_centers)
  return lax.psum(jnp.where(lax.axis_index('fsdp') == 0, mean, 0), 'fsdp')


def _reseed(c_kD, empty_k, x_nD, score_n, usable_n):
  """Empty clusters restart at the points farthest from their centers.

  The i-th empty center takes the i-th worst-served point, lower rows first
  among equals; what exceeds the limit waits for the next iteration.
  """
  n = x_nD.shape[0]
  score_n = jnp.where(usable_n, score_n, jnp.inf)
  worst, row = lax.top_k(-score_n, min(n, _MAX_RESEEDED))
  gather = functools.partial(lax.all_gather, axis_name='data', tiled=True)
  worst, rows = gather(worst), gather(x_nD[row])
  limit = min(len(worst), _MAX_RESEEDED)
  worst, place = lax.top_k(worst, limit)

  rank = jnp.cumsum(lax.all_gather(empty_k, 'fsdp', tiled=True)) - 1
  k = c_kD.shape[0]
  rank_k = lax.dynamic_slice_in_dim(rank, lax.axis_index('fsdp') * k, k)
  chosen = jnp.minimum(rank_k, limit - 1)
  take = empty_k & (rank_k < limit) & jnp.isfinite(worst[chosen])
  return jnp.where(take[:, None], rows[place[chosen]], c_kD)


@functools.cache
def _make_lookup(mesh: Mesh, num_centers: int, num_labels: int):
  """Centers, points -> the nearest centers of every point."""
  tile_rows, tile_centers = _tile_shape(mesh)

  def lookup(c_kD, x_nD):
    k, dim = c_kD.shape
    offset = lax.axis_index('fsdp') * k
    starts = offset + jnp.arange(0, k, tile_centers, dtype=jnp.int32)
    c_tiles = c_kD.reshape(-1, tile_centers, dim)

    def rows(x_TD):
      def centers(best, start_and_tile):
        start, c_tD = start_and_tile
        s_Tt = _scores(c_tD, x_TD, start, num_centers, lax.Precision.HIGHEST).T
        center = start + lax.broadcasted_iota(jnp.int32, s_Tt.shape, 1)
        # What is held comes first: top_k keeps the earlier of equals.
        scores = jnp.concatenate([best[0], s_Tt], axis=1)
        ids = jnp.concatenate([best[1], center], axis=1)
        score, place = lax.top_k(scores, num_labels)
        return (score, jnp.take_along_axis(ids, place, axis=1)), None

      unknown = (
        jnp.full((tile_rows, num_labels), -jnp.inf, jnp.float32),
        jnp.full((tile_rows, num_labels), num_centers, jnp.int32),
      )
      return lax.scan(centers, unknown, (starts, c_tiles))[0]

    score, center = lax.map(rows, x_nD.reshape(-1, tile_rows, dim))
    return _merge(
      score.reshape(-1, num_labels), center.reshape(-1, num_labels), num_labels
    )

  return jax.jit(
    jax.shard_map(
      lookup,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.POINTS),
      out_specs=(sharding.POINTS, sharding.POINTS),
      check_vma=False,
    )
  )
