"""The assignment of rows to centers: one interface and two methods.

`Plain` makes the exact passes of Lloyd's algorithm. `fast.screened.Screened`
makes approximate passes and is for CPUs only. `choose` picks one of the two.

Shapes: N rows, K centers, D dimensions, n rows of a chunk.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import sharding
from mlcd_jax.kmeans import chunks as chunks_lib
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import tiles
from mlcd_jax.kmeans.fast import screened

METHODS = ('auto', 'exact')


class Assigner(Protocol):
  """The interface of what assigns rows to centers and sums them up.

  In each pass the caller calls `begin` once, `add` for every chunk in order,
  updates the centers, and calls `finish`. Sums and counts are the sum and the
  number of the rows assigned to each center.

  Attributes:
    name: the name of the method. A saved state belongs to one method.
    in_flight: the number of chunks that may be searched at the same time.
  """

  name: str
  in_flight: int

  def begin(self, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prepares a pass.

    Args:
      centers: the centers [K, D] of this pass, padded.

    Returns:
      The sums [data, K, D] and counts [data, K] that the pass starts from,
      sharded as programs.SUMS.
    """

  def add(
    self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | int]:
    """Assigns the rows of a chunk and adds them to the sums.

    Args:
      sums: the sums so far. Their memory is reused, so the caller cannot read
        them any more.
      counts: the counts so far. Their memory is reused as well.
      chunk: the number of the chunk.
      x_nD: the unit rows of the chunk.

    Returns:
      The new sums, the new counts, the cosine of each row to its center [n],
      and the number of rows that are zero. Zero rows are padding or bad rows;
      their cosine is infinite. A pass that starts from the sums of the one
      before may return 0 as the number, since the first pass counted them.
    """

  def finish(
    self,
    sums: jax.Array,
    counts: jax.Array,
    shift: jax.Array,
    restarted: np.ndarray,
    centers: jax.Array,
  ) -> None:
    """Ends a pass, after the update of the centers.

    Args:
      sums: the sums of the whole pass.
      counts: the counts of the whole pass.
      shift: the distance that each center moved in the update [K], padded.
      restarted: the numbers of the centers that had no rows.
      centers: the new centers [K, D], padded.
    """

  def state(self) -> dict[str, np.ndarray]:
    """Returns the arrays that the next pass needs besides the centers.

    They are copied to the host, so that they can be saved.
    """


class Plain:
  """An assigner that compares every row with every center.

  It keeps nothing between passes. `Assigner` describes its methods.
  """

  name = 'plain'
  # Each chunk adds to the sums of the chunk before, so a second chunk would
  # only wait.
  in_flight = 1

  def __init__(
    self,
    mesh: Mesh,
    num_centers: int,
    *,
    mean: np.ndarray,
    score_dtype: jnp.dtype | None = None,
  ):
    """Makes the program that adds a chunk.

    Args:
      mesh: the mesh of all devices.
      num_centers: K.
      mean: the approximate mean of the rows [D]. It is subtracted from the
        centers before they are rounded, which then costs less precision.
      score_dtype: the type that rows and centers are rounded to for scoring,
        while products are summed in float32; `tiles.score_dtype` by default.
    """
    self._mesh = mesh
    self._mean = mean
    dtype = jnp.dtype(score_dtype or tiles.score_dtype(mesh))
    self._add = programs.make_add(mesh, num_centers, dtype)

  def begin(self, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prepares a pass; see `Assigner`."""
    self._centers = centers
    return programs.make_zeros(self._mesh, *centers.shape)()

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """Assigns the rows of a chunk; see `Assigner`."""
    return self._add(self._centers, self._mean, sums, counts, x_nD)

  def finish(self, sums, counts, shift, restarted, centers) -> None:
    """Forgets the centers of the pass; see `Assigner`."""
    self._centers = None  # The update has taken over their memory.

  def state(self) -> dict[str, np.ndarray]:
    """Returns an empty state; see `Assigner`."""
    return {}


def choose(
  method: str,
  chunks: chunks_lib.Chunks,
  num_centers: int,
  *,
  iteration: int = 0,
  saved: tuple[str, Mapping[str, np.ndarray]] = ('', {}),
) -> Assigner:
  """Makes the assigner of a clustering.

  Args:
    method: 'exact' for Plain. 'auto' for Screened on CPUs if the clustering is
      large enough to be faster with it, else for Plain.
    chunks: the rows.
    num_centers: K.
    iteration: the number of iterations done before.
    saved: the name and the state of the assigner of these iterations. If it is
      another assigner than the one made here, the state is ignored.

  Raises:
    ValueError: the method is unknown.
  """
  if method not in METHODS:
    raise ValueError(f'method={method}: say ' + ' or '.join(METHODS))
  sample = chunks.sample()
  pays = screened.pays(*chunks.rows.shape, num_centers)
  if method == 'exact' or not (sharding.on_cpu(chunks.mesh) and pays):
    return Plain(chunks.mesh, num_centers, mean=sample.mean)
  name, state = saved
  return screened.Screened(
    chunks,
    sample,
    num_centers,
    iteration=iteration,
    state=state if name == screened.Screened.name else {},
  )
