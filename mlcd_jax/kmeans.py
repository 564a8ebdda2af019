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

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import activity
from mlcd_jax import lookup
from mlcd_jax import nearest
from mlcd_jax import partial_pass
from mlcd_jax import points
from mlcd_jax import screening as screening_lib
from mlcd_jax import sharding

# Empty clusters that can restart in one iteration.
_MAX_RESEEDED = 1_024

# Rows left out that are named.
_MAX_NAMED = 20


class Fit(NamedTuple):
  """A clustering, finished or after some of its iterations.

  Attributes:
    centers: float32 [K, D] unit rows.
    objective: mean cosine of the points to their centers, one an iteration,
      measured before that iteration's update.
    counts: int32 [K], points of each center in the last iteration.
    reseeded: centers found empty and restarted, one number an iteration.
    skipped: rows left out because they are zero or not finite.
    bad_rows: numbers of the first of these.
    part: of the iteration that has begun, if one has.
    labels: int32 [N] of the last iteration, on CPUs; this and what follows is
      what the next one knows of where labels can change.
    scores: float32 [N], of the points to their labels.
    moved: bool [K], the centers that the last update moved.
    width: leading dimensions that are screened by; 0 = nothing is screened.
  """

  centers: np.ndarray
  objective: list[float]
  counts: np.ndarray
  reseeded: list[int]
  skipped: int
  bad_rows: list[int]
  part: partial_pass.Part | None = None
  labels: np.ndarray = np.zeros(0, np.int32)
  scores: np.ndarray = np.zeros(0, np.float32)
  moved: np.ndarray = np.zeros(0, bool)
  width: int = 0


def fit(
  embeddings: points.Rows,
  num_centers: int,
  *,
  iterations: int = 25,
  seed: int = 0,
  init: np.ndarray | None = None,
  tolerance: float = 0.0,
  mesh: Mesh | None = None,
  score_dtype: jnp.dtype | None = None,
  screening: str = 'auto',
  resume: Fit | None = None,
  save: Callable[[Fit], None] | None = None,
  save_every_tiles: int = 0,
  progress: Callable[[int, float, int], None] | None = None,
) -> Fit:
  """Clusters rows by the cosine to their nearest center.

  Rows that do not fit on the devices are read anew in every iteration.

  Args:
    embeddings: [N, D], normalised here.
    num_centers: K.
    iterations: passes over the data.
    seed: chooses the first centers among the rows.
    init: instead of `seed`, row numbers [K] or centers [K, D].
    tolerance: stop when the objective gains less than this share; 0 = never.
    mesh: all devices, points split over them, where not given.
    score_dtype: of the products' operands, which accumulate in float32; where
      not given bfloat16, or float32 on CPUs that have no products of bfloat16.
    screening: 'auto' = on CPUs, score on leading dimensions where a sample
      shows that it costs the objective less than 1e-4 of it; 'off' = never.
    resume: what `save` got, to go on from with the same bits.
    save: called after each iteration, on every process.
    save_every_tiles: call it within iterations too, after so many tiles of
      points on every device, in whole chunks; 0 = never. Sums are then added
      up there, which can change their last bit.
    progress: called with iteration, objective and reseeded centers.

  Raises:
    ValueError: more centers than usable rows, or `init` or `screening` does
      not fit.
  """
  if screening not in ('auto', 'off'):
    raise ValueError(f'screening={screening}: say auto or off')
  mesh = mesh or sharding.make_mesh()
  num_points = embeddings.shape[0]
  if num_centers > num_points:
    raise ValueError(
      f'{num_centers} centers need as many rows; there are {num_points}'
    )
  score_dtype = jnp.dtype(score_dtype or nearest.score_dtype(mesh))
  tile = nearest.tile_shape(mesh, num_centers)
  chunks = points.Points(embeddings, mesh, tile=tile[0], hold=True)
  sample = screening_lib.Sample(embeddings, mesh, num_centers, score_dtype)
  programs = _Programs(mesh, num_centers, score_dtype, sample.mean)
  done = resume
  if done is None:
    first = _first_centers(embeddings, num_centers, seed, init)
    done = Fit(first, [], np.zeros(num_centers, np.int32), [], 0, [])
  known = None
  if nearest.on_cpu(mesh):
    known = activity.Activity(
      mesh,
      num_centers,
      chunks,
      sample=sample,
      score_dtype=score_dtype,
      screens=(
        screening == 'auto'
        and screening_lib.pays(*embeddings.shape, num_centers)
      ),
    )
    known.restore(done)
  c_KD = nearest.put_centers(done.centers, mesh)
  every = -(-save_every_tiles * tile[0] * mesh.shape['data'] // chunks.chunk)
  while len(done.objective) < iterations and not _converged(done, tolerance):
    c_KD, done = _iterate(
      c_KD, done, chunks, embeddings, programs, known, save, every
    )
    if save:
      save(_on_host(c_KD, done, known))
    if progress:
      i = len(done.objective) - 1
      progress(i, done.objective[i], done.reseeded[i])
  return _on_host(c_KD, done, known)


def abstract_pass(
  mesh: Mesh, num_centers: int, dim: int, *, score_dtype=jnp.bfloat16
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
  """The program that takes nearly all the time, and what it is called with.

  Args:
    mesh: of all devices.
    num_centers: K.
    dim: D.
    score_dtype: of the products' operands.

  Returns:
    The jitted function that adds a chunk of points to the sums of their
    centers, and its arguments' shapes, types and shardings.
  """
  rows = nearest.padded_centers(num_centers, mesh)
  chunk = points.chunk_rows(mesh, nearest.tile_shape(mesh, num_centers)[0])
  parts = mesh.shape['data']
  return _make_add(mesh, num_centers, jnp.dtype(score_dtype)), tuple(
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for shape, dtype, spec in (
      ((rows, dim), jnp.float32, sharding.CENTERS),
      ((dim,), jnp.float32, sharding.REPLICATED),
      ((parts, rows, dim), jnp.float32, nearest.SUMS),
      ((parts, rows), jnp.int32, nearest.SUMS),
      ((chunk, dim), jnp.float32, sharding.POINTS),
    )
  )


def _on_host(c_KD, done: Fit, known: activity.Activity | None) -> Fit:
  """The whole state."""
  centers = nearest.to_host(c_KD)[: len(done.counts)]
  return done._replace(centers=centers, **(known.state() if known else {}))


def _converged(done: Fit, tolerance: float) -> bool:
  if not tolerance or len(done.objective) < 2:
    return False
  before, after = done.objective[-2:]
  return after - before < tolerance * before


def _iterate(c_KD, done, chunks, embeddings, programs, known, save, every):
  """One pass over the points, and the new centers."""
  num_centers = len(done.counts)
  first_pass = not done.objective
  part = done.part or partial_pass.NOTHING
  if done.part:
    sums, counts = partial_pass.to_devices(part, c_KD.sharding.mesh)
  else:
    sums, counts = programs.zeros(c_KD.shape[1])
  looks = bool(known) and known.begin(c_KD)
  cosines, bad_rows = {}, list(done.bad_rows)
  for i, x_nD in enumerate(chunks.after(part.chunks), part.chunks):
    if looks:
      sums, counts, cosines[i], num_bad = known.add(sums, counts, i, x_nD)
    else:
      sums, counts, label_n, score_n, cosines[i], num_bad = programs.add(
        c_KD, programs.mean, sums, counts, x_nD
      )
      if known:
        known.keep(i, label_n, score_n)
    # No more than two chunks are on their way, and the host looks for bad rows
    # only where there are some.
    jax.block_until_ready(cosines.get(i - 1))
    if first_pass and len(bad_rows) < _MAX_NAMED:
      start, stop = chunks.rows_of(i)
      if int(num_bad) > chunks.chunk - (stop - start):
        bad_rows += chunks.bad_rows(i)
    if every and (i + 1) % every == 0 and i + 1 < len(chunks):
      part = partial_pass.Part(
        i + 1,
        *partial_pass.to_host(sums, counts, num_centers),
        *_worst(part, cosines, chunks, programs),
      )
      sums, counts = partial_pass.to_devices(part, c_KD.sharding.mesh)
      cosines = {}
      if save:
        begun = done._replace(bad_rows=bad_rows[:_MAX_NAMED], part=part)
        save(_on_host(c_KD, begun, known))
  if known:
    known.check(c_KD)
  c_KD, total, counts, shift = programs.update(c_KD, sums, counts)
  counts = nearest.to_host(counts)[:num_centers]
  usable = int(counts.sum())
  if num_centers > usable:
    raise ValueError(
      f'{num_centers} centers need as many rows; there are {usable} of '
      f'{embeddings.shape[0]} that are finite and not zero'
    )
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    worst = _worst(part, cosines, chunks, programs)[1][: len(empty)]
    c_KD = programs.replace(c_KD, empty[: len(worst)], embeddings, worst)
  if known:
    shift = nearest.to_host(shift)[:num_centers].copy()
    shift[empty] = np.inf
    known.finish(c_KD, shift)
  return c_KD, done._replace(
    counts=counts,
    objective=[*done.objective, float(total) / usable],
    reseeded=[*done.reseeded, len(empty)],
    skipped=embeddings.shape[0] - usable,
    bad_rows=bad_rows[:_MAX_NAMED],
    part=None,
  )


def _worst(part, scores, chunks, programs) -> tuple[np.ndarray, np.ndarray]:
  """Scores and rows farthest from their centers, the farthest first.

  Among equals the lower row comes first; what exceeds the limit waits for the
  next iteration.

  Args:
    part: has those of its chunks.
    scores: of the chunks since, by number.
    chunks: of all points.
    programs: compiled.
  """
  found_scores, found_rows = [part.worst_scores], [part.worst_rows]
  for i, score_n in scores.items():
    score, place = map(nearest.to_host, programs.worst(score_n))
    usable = np.isfinite(score)  # Padding and bad rows are inf.
    found_scores.append(score[usable])
    found_rows.append(chunks.rows_of(i)[0] + place[usable].astype(np.int64))
  found_scores = np.concatenate(found_scores)
  order = np.argsort(found_scores, kind='stable')[:_MAX_RESEEDED]
  return found_scores[order], np.concatenate(found_rows)[order]


def nearest_centers(
  embeddings: points.Rows,
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
  look_up = lookup.make_lookup(mesh, len(centers), num_labels)
  c_KD = nearest.put_centers(points.unit_rows(np.asarray(centers)), mesh)
  chunks = points.Points(
    embeddings,
    mesh,
    tile=nearest.tile_shape(mesh, len(centers))[0],
    hold=False,
  )
  labels = np.zeros((embeddings.shape[0], num_labels), np.int32)
  scores = np.zeros(labels.shape, np.float32)
  for i, x_nD in enumerate(chunks):
    start, stop = chunks.rows_of(i)
    score_nL, center_nL = look_up(c_KD, x_nD)
    labels[start:stop] = nearest.to_host(center_nL)[: stop - start]
    scores[start:stop] = nearest.to_host(score_nL)[: stop - start]
  return labels, scores


def _first_centers(
  embeddings: points.Rows, num_centers: int, seed: int, init: np.ndarray | None
) -> np.ndarray:
  """Centers [K, D] before the first iteration."""
  num_points, dim = embeddings.shape
  if init is None:
    rng = np.random.default_rng(seed)
    init = rng.choice(num_points, num_centers, replace=False)
  init = np.asarray(init)
  if init.ndim == 1 and len(init) == num_centers:
    return points.unit_rows_at(embeddings, init)
  if init.shape != (num_centers, dim):
    raise ValueError(
      f'init has shape {init.shape}; give row numbers [{num_centers}] or '
      f'centers [{num_centers}, {dim}]'
    )
  return points.unit_rows(init)


class _Programs:
  """The compiled parts of an iteration."""

  def __init__(
    self,
    mesh: Mesh,
    num_centers: int,
    score_dtype: jnp.dtype,
    mean: np.ndarray,
  ):
    self.mean = mean
    self._mesh = mesh
    self._num_centers = num_centers
    self.add = _make_add(mesh, num_centers, score_dtype)
    self.update = _make_update(mesh)

  def zeros(self, dim: int) -> tuple[jax.Array, jax.Array]:
    """Sums [data, K, D] and counts [data, K], padding included."""
    rows = nearest.padded_centers(self._num_centers, self._mesh)
    return _make_zeros(self._mesh, rows, dim)()

  def worst(self, score_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest scores of a chunk and their places."""
    return _lowest(score_n, min(len(score_n), _MAX_RESEEDED))

  def replace(
    self,
    c_KD: jax.Array,
    centers: np.ndarray,
    embeddings: points.Rows,
    rows: np.ndarray,
  ) -> jax.Array:
    """Puts rows in the place of centers."""
    ids = np.full(_MAX_RESEEDED, len(c_KD), np.int32)  # Out of bounds.
    ids[: len(centers)] = centers
    new = np.zeros((_MAX_RESEEDED, c_KD.shape[1]), np.float32)
    for i, row in enumerate(rows.tolist()):
      new[i] = points.unit_rows(np.asarray(embeddings[row : row + 1]))[0]
    return _make_replace(self._mesh)(c_KD, ids, new)


@functools.cache
def _make_add(mesh: Mesh, num_centers: int, score_dtype: jnp.dtype):
  """A chunk -> sums, counts, labels, scores, cosines, bad points."""
  tile = nearest.tile_shape(mesh, num_centers)

  def add(c_kD, mean_D, sums_1kD, counts_1k, x_nD):
    usable_n = jnp.any(x_nD != 0, axis=1)
    # Embeddings share a large mean, which would take up most of a low
    # precision's digits. Without it the order of the centers is the same.
    c_kD = nearest.real_centers(c_kD, num_centers) - mean_D[None]
    score, center = nearest.best_center(
      c_kD.astype(score_dtype), x_nD.astype(score_dtype), tile=tile
    )
    center += lax.axis_index('fsdp') * c_kD.shape[0]
    score, center = nearest.merge(score[:, None], center[:, None], 1)
    score_n, center_n = score[:, 0], center[:, 0]
    return (
      *nearest.add_points(sums_1kD, counts_1k, x_nD, center_n, usable_n),
      center_n,
      score_n,
      jnp.where(usable_n, score_n + x_nD @ mean_D, jnp.inf),
      lax.psum(jnp.sum(~usable_n), 'data'),
    )

  rows, sums = sharding.POINTS, nearest.SUMS
  return jax.jit(
    jax.shard_map(
      add,
      mesh=mesh,
      in_specs=(sharding.CENTERS, sharding.REPLICATED, sums, sums, rows),
      out_specs=(sums, sums, rows, rows, rows, sharding.REPLICATED),
      # Equal on all devices by construction, which types cannot show.
      check_vma=False,
    ),
    donate_argnums=(2, 3),
  )


@functools.cache
def _make_update(mesh: Mesh):
  """Centers, sums, counts -> centers, sum of cosines, counts, shifts [K]."""

  def update(c_kD, sums_1kD, counts_1k):
    sums_kD, counts_k = lax.psum((sums_1kD[0], counts_1k[0]), 'data')
    # The sum of every point's cosine to its center, in float32.
    total = lax.psum(jnp.sum(sums_kD * c_kD), 'fsdp')
    norm = jnp.sqrt(jnp.sum(jnp.square(sums_kD), axis=1, keepdims=True))
    new_kD = jnp.where(norm > 0, sums_kD / jnp.where(norm > 0, norm, 1), c_kD)
    shift_k = jnp.sqrt(jnp.sum(jnp.square(new_kD - c_kD), axis=1))
    return new_kD, total, counts_k, shift_k

  return jax.jit(
    jax.shard_map(
      update,
      mesh=mesh,
      in_specs=(sharding.CENTERS, nearest.SUMS, nearest.SUMS),
      out_specs=(
        sharding.CENTERS,
        sharding.REPLICATED,
        sharding.CENTERS,
        sharding.CENTERS,
      ),
      check_vma=False,
    ),
    donate_argnums=0,
  )


@functools.cache
def _make_zeros(mesh: Mesh, rows: int, dim: int):
  parts = mesh.shape['data']
  return jax.jit(
    lambda: (
      jnp.zeros((parts, rows, dim), jnp.float32),
      jnp.zeros((parts, rows), jnp.int32),
    ),
    out_shardings=NamedSharding(mesh, nearest.SUMS),
  )


@functools.cache
def _make_replace(mesh: Mesh):
  return jax.jit(
    lambda c_KD, ids, new: c_KD.at[ids].set(new, mode='drop'),
    out_shardings=NamedSharding(mesh, sharding.CENTERS),
    donate_argnums=0,
  )


@functools.partial(jax.jit, static_argnums=1)
def _lowest(score_n: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  negative, place = lax.top_k(-score_n, count)
  return -negative, place
