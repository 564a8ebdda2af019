"""Spherical k-means on the mesh, and the nearest centers of every row.

Lloyd's algorithm on unit vectors, exact and flat: points are split over the
mesh axis "data", centers over "fsdp", and scores exist one tile at a time,
never as an [N, K] array. Tiles have a fixed shape and ties go to the lower
index, so one assignment pass gives the same labels on every mesh.

Shapes: N points, K centers, D dimensions, T points a tile, L labels a point.
Upper case is global, lower case this device's part.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import lloyd
from mlcd_jax import lookup
from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import sharding

Fit = lloyd.Fit


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
    screening: 'auto' = on CPUs, compare a point with a few candidates where a
      sample shows that it costs the objective less than 1e-4 of it; 'off' =
      never.
    resume: what `save` got, to go on from with the same bits.
    save: called after each iteration, on every process.
    progress: called with iteration, objective and reseeded centers.

  Raises:
    ValueError: more centers than usable rows, or `init` or `screening` does
      not fit.
  """
  if screening not in ('auto', 'off'):
    raise ValueError(f'screening={screening}: say auto or off')
  mesh = mesh or sharding.make_mesh()
  if num_centers > embeddings.shape[0]:
    raise ValueError(
      f'{num_centers} centers need as many rows; there are '
      f'{embeddings.shape[0]}'
    )
  start = resume
  if start is None:
    centers = _first_centers(embeddings, num_centers, seed, init)
    start = Fit(centers, [], np.zeros(num_centers, np.int32), [], 0, [])
  run = lloyd.Lloyd(
    embeddings,
    mesh,
    start,
    score_dtype=jnp.dtype(score_dtype or nearest.score_dtype(mesh)),
    screens=screening == 'auto',
  )
  while len(run.done.objective) < iterations and not _converged(
    run.done, tolerance
  ):
    run.iterate()
    if save:
      save(run.state())
    if progress:
      done = run.done
      progress(len(done.objective) - 1, done.objective[-1], done.reseeded[-1])
  return run.state()


def _converged(done: Fit, tolerance: float) -> bool:
  if not tolerance or len(done.objective) < 2:
    return False
  before, after = done.objective[-2:]
  return after - before < tolerance * before


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
