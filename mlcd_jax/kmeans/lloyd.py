"""Lloyd's iterations of spherical k-means: the loop.

Shapes: N rows, K centers, D dimensions.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import types
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import assign
from mlcd_jax.kmeans import chunks as chunks_lib
from mlcd_jax.kmeans import passes
from mlcd_jax.kmeans import tiles

# Empty clusters that can restart in one iteration; the rest wait for the next.
# A fixed number, so that one program serves any count. Not tuned.
_MAX_RESEEDED = 1_024

# Bad rows that are named; their number is counted in full.
_MAX_NAMED = 20


class Fit(NamedTuple):
  """A clustering, finished or after some of its iterations.

  Attributes:
    centers: float32 [K, D] unit rows.
    objective: mean cosine of the rows to their centers, one an iteration,
      measured before that iteration's update.
    counts: int32 [K], rows of each center in the last iteration.
    reseeded: centers found empty and restarted, one number an iteration.
    skipped: number of rows left out because they are zero or not finite.
    bad_rows: numbers of the first of these.
    assigner: name of the assigner that made the last pass ('plain' for exact
      passes, 'screened' for approximate ones); '' before the first.
    assigner_state: what that assigner needs to go on, by name.
  """

  centers: np.ndarray
  objective: list[float]
  counts: np.ndarray
  reseeded: list[int]
  skipped: int
  bad_rows: list[int]
  assigner: str = ''
  assigner_state: Mapping[str, np.ndarray] = types.MappingProxyType({})


def fit(
  embeddings: unit.Rows,
  num_centers: int,
  *,
  iterations: int = 25,
  seed: int = 0,
  init: np.ndarray | Fit | None = None,
  tolerance: float = 0.0,
  method: str = 'auto',
  mesh: Mesh | None = None,
) -> Fit:
  """Clusters rows by the cosine to their nearest center.

  Rows that do not fit on the devices are read anew in every iteration.

  The default is approximate on CPUs. From 512 centers, 256 dimensions and 2,048
  rows on, 'auto' compares a row with a few candidate centers. That takes 0.26
  to 0.45 of the seconds of 'exact' per iteration, and costs little: the last
  objective was 2.2e-4 lower at worst (24,576 x 768 rows of loose data, 4,096
  centers), 8e-5 with tight data, and the same on 100,000 x 512 rows with 1,000
  centers. The programs of 'auto' take a few seconds longer to compile. Runs on
  different meshes agree to 1e-4 of the objective, those of 'exact' to 1e-6. On
  accelerators 'auto' is 'exact'.

  Args:
    embeddings: [N, D]; they need not be unit rows.
    num_centers: K.
    iterations: passes over the data.
    seed: chooses the rows that are the first centers.
    init: used instead of `seed`: row numbers [K], centers [K, D], or a Fit to
      go on from, which gives the same bits as a run that never stopped.
    tolerance: stop when the objective gains less than this share; 0 = never.
    method: 'auto' or 'exact'.
    mesh: all devices, with rows split over them, where not given.

  Returns:
    The clustering after the last iteration.

  Raises:
    ValueError: there are more centers than usable rows, or `init` or `method`
      is not valid.
  """
  run = _prepare(embeddings, num_centers, seed, init, method, mesh)
  while run.is_due(iterations, tolerance):
    run.step()
  return run.state()


def iterate(
  embeddings: unit.Rows,
  num_centers: int,
  *,
  iterations: int = 25,
  seed: int = 0,
  init: np.ndarray | Fit | None = None,
  tolerance: float = 0.0,
  method: str = 'auto',
  mesh: Mesh | None = None,
) -> Iterator[Fit]:
  """Yields the clustering after each iteration; see `fit`.

  With a Fit as `init`, it yields only the iterations that are still to be done.
  """
  run = _prepare(embeddings, num_centers, seed, init, method, mesh)

  def states():
    while run.is_due(iterations, tolerance):
      run.step()
      yield run.state()

  return states()


def _prepare(
  embeddings: unit.Rows,
  num_centers: int,
  seed: int,
  init: np.ndarray | Fit | None,
  method: str,
  mesh: Mesh | None,
) -> 'Lloyd':
  mesh = mesh or sharding.make_mesh()
  if num_centers > embeddings.shape[0]:
    raise ValueError(
      f'{num_centers} centers need as many rows; there are '
      f'{embeddings.shape[0]}'
    )
  start = init
  if not isinstance(init, Fit):
    start = Fit(
      centers=first_centers(embeddings, num_centers, seed, init),
      objective=[],
      counts=np.zeros(num_centers, np.int32),
      reseeded=[],
      skipped=0,
      bad_rows=[],
    )
  elif init.centers.shape != (num_centers, embeddings.shape[1]):
    raise ValueError(
      f'init has centers of shape {init.centers.shape}; '
      f'[{num_centers}, {embeddings.shape[1]}] are needed'
    )
  tile = tiles.tile_shape(mesh, num_centers)[0]
  chunks = chunks_lib.Chunks(embeddings, mesh, tile=tile, hold=True)
  assigner = assign.choose(
    method,
    chunks,
    num_centers,
    iteration=len(start.objective),
    saved=(start.assigner, start.assigner_state),
  )
  return Lloyd(chunks, assigner, start)


def first_centers(
  embeddings: unit.Rows, num_centers: int, seed: int, init: np.ndarray | None
) -> np.ndarray:
  """Returns the centers [K, D] before the first iteration; see `fit`."""
  num_rows, dim = embeddings.shape
  if init is None:
    rng = np.random.default_rng(seed)
    init = rng.choice(num_rows, num_centers, replace=False)
  init = np.asarray(init)
  if init.ndim == 1 and len(init) == num_centers:
    return unit.unit_rows_at(embeddings, init)
  if init.shape != (num_centers, dim):
    raise ValueError(
      f'init has shape {init.shape}; give row numbers [{num_centers}] or '
      f'centers [{num_centers}, {dim}]'
    )
  return unit.unit_rows(init)


class Lloyd:
  """A clustering that can be iterated."""

  def __init__(
    self, chunks: chunks_lib.Chunks, assigner: assign.Assigner, start: Fit
  ):
    """Goes on from a start.

    Args:
      chunks: of the rows.
      assigner: finds the rows' centers.
      start: its centers [K, D], and the iterations that are done.
    """
    self._chunks = chunks
    self._assigner = assigner
    self._mesh = chunks.mesh
    self._num_centers = len(start.centers)
    self._centers = tiles.put_centers(start.centers, self._mesh)
    # The iterations so far. `state` adds centers and the assigner's state.
    self._done = start._replace(assigner=assigner.name, assigner_state={})

  def is_due(self, iterations: int, tolerance: float) -> bool:
    """Returns whether there is another iteration to do; see `fit`."""
    objective = self._done.objective
    if len(objective) >= iterations:
      return False
    if not tolerance or len(objective) < 2:
      return True
    return objective[-1] - objective[-2] >= tolerance * objective[-2]

  def state(self) -> Fit:
    """Returns all that is needed to go on, on the host."""
    return self._done._replace(
      centers=sharding.to_host(self._centers)[: self._num_centers],
      assigner_state=self._assigner.state(),
    )

  def step(self) -> None:
    """Makes one pass over the rows, and the new centers.

    Raises:
      ValueError: there are more centers than usable rows.
    """
    num_rows = self._chunks.rows.shape[0]
    sums, counts, cosines = self._pass()
    self._centers, total, count_K, shift = passes.make_update(self._mesh)(
      self._centers, sums, counts
    )
    count_K = sharding.to_host(count_K)[: self._num_centers]
    usable = int(count_K.sum())
    if self._num_centers > usable:
      raise ValueError(
        f'{self._num_centers} centers need as many rows; there are {usable} of '
        f'{num_rows} that are finite and not zero'
      )
    empty = np.flatnonzero(count_K == 0)
    if len(empty):
      self._replace(empty, self._worst_rows(cosines)[: len(empty)])
    self._assigner.finish(sums, counts, shift, empty, self._centers)
    self._done = self._done._replace(
      counts=count_K,
      objective=[*self._done.objective, float(total) / usable],
      reseeded=[*self._done.reseeded, len(empty)],
      skipped=num_rows - usable,
    )

  def _pass(self) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
    """Returns sums and counts of all rows, and the cosines of each chunk."""
    sums, counts = self._assigner.begin(self._centers)
    cosines, num_bad = {}, {}
    for i, x_nD in enumerate(self._chunks):
      sums, counts, cosines[i], num_bad[i] = self._assigner.add(
        sums, counts, i, x_nD
      )
      # Waits, so that not all chunks lie in memory at once.
      jax.block_until_ready(cosines.get(i - self._assigner.in_flight))
    self._name_bad_rows(num_bad)
    return sums, counts, cosines

  def _name_bad_rows(self, num_bad: Mapping[int, jax.Array | int]) -> None:
    """Looks for the bad rows once, in the chunks that have some."""
    bad_rows = self._done.bad_rows
    for i, num in num_bad.items():
      if self._done.objective or len(bad_rows) >= _MAX_NAMED:
        return
      start, stop = self._chunks.rows_of(i)
      if int(num) > self._chunks.chunk - (stop - start):
        bad_rows = (bad_rows + self._chunks.bad_rows(i))[:_MAX_NAMED]
        self._done = self._done._replace(bad_rows=bad_rows)

  def _worst_rows(self, cosines: Mapping[int, jax.Array]) -> np.ndarray:
    """Returns the rows farthest from their centers, the farthest first.

    Among equals the lower row comes first.
    """
    scores, rows = [], []
    for i, score_n in cosines.items():
      lowest = passes.lowest(score_n, min(len(score_n), _MAX_RESEEDED))
      score, place = map(sharding.to_host, lowest)
      usable = np.isfinite(score)  # Padding and bad rows are infinite.
      scores.append(score[usable])
      first = self._chunks.rows_of(i)[0]
      rows.append(first + place[usable].astype(np.int64))
    order = np.argsort(np.concatenate(scores), kind='stable')[:_MAX_RESEEDED]
    return np.concatenate(rows)[order]

  def _replace(self, centers: np.ndarray, rows: np.ndarray) -> None:
    """Puts rows in the place of the first of some centers."""
    # Numbers out of bounds are left out, so that one program serves any count.
    ids = np.full(_MAX_RESEEDED, len(self._centers), np.int32)
    ids[: len(rows)] = centers[: len(rows)]
    new = np.zeros((_MAX_RESEEDED, self._centers.shape[1]), np.float32)
    new[: len(rows)] = unit.unit_rows_at(self._chunks.rows, rows)
    self._centers = passes.make_replace(self._mesh)(self._centers, ids, new)
