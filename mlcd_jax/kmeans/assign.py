"""How the rows of a pass get their centers: one interface, two methods.

`Plain` is Lloyd's exact pass. `fast.screened.Screened` is approximate, and for
CPUs only. `choose` picks one of them.

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
from mlcd_jax.kmeans import passes
from mlcd_jax.kmeans import tiles
from mlcd_jax.kmeans.fast import screened

METHODS = ('auto', 'exact')


class Assigner(Protocol):
  """Assigns rows to centers and adds them up, pass by pass.

  Attributes:
    name: of the kind of assigner, which a saved state is for.
    in_flight: number of chunks that may be searched at once.
  """

  name: str
  in_flight: int

  def begin(self, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prepares a pass.

    Args:
      centers: [K, D], padded.

    Returns:
      Sums and counts, sharded as passes.SUMS, that the pass starts from.
    """

  def add(
    self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | int]:
    """Assigns the rows of a chunk.

    Args:
      sums: until now; given up.
      counts: until now; given up.
      chunk: its number.
      x_nD: its rows.

    Returns:
      sums, counts, cosines [n] of the rows to their centers (infinite for bad
      rows), and the number of bad rows.
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
      sums: of the whole pass.
      counts: of the whole pass.
      shift: how far each center moved, [K], padded.
      restarted: numbers of the centers that were found empty.
      centers: the new ones.
    """

  def state(self) -> dict[str, np.ndarray]:
    """Returns what the next pass needs to know, on the host."""


class Plain:
  """Compares every row with every center, as Lloyd's algorithm does.

  It keeps nothing between passes. See `Assigner`.
  """

  name = 'plain'
  # Each chunk adds to the sums of the one before, so more would only wait.
  in_flight = 1

  def __init__(
    self,
    mesh: Mesh,
    num_centers: int,
    *,
    mean: np.ndarray,
    score_dtype: jnp.dtype | None = None,
  ):
    """Prepares the program.

    Args:
      mesh: of all devices.
      num_centers: K.
      mean: of the rows, about; taken off the centers before scoring.
      score_dtype: type of the products' operands, whose sums are float32; the
        mesh's fastest where not given.
    """
    self._mesh = mesh
    self._mean = mean
    dtype = jnp.dtype(score_dtype or tiles.score_dtype(mesh))
    self._add = passes.make_add(mesh, num_centers, dtype)

  def begin(self, centers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `Assigner`."""
    self._centers = centers
    return passes.make_zeros(self._mesh, *centers.shape)()

  def add(self, sums: jax.Array, counts: jax.Array, chunk: int, x_nD):
    """See `Assigner`."""
    return self._add(self._centers, self._mean, sums, counts, x_nD)

  def finish(self, sums, counts, shift, restarted, centers) -> None:
    """See `Assigner`."""
    self._centers = None  # Its memory is the update's.

  def state(self) -> dict[str, np.ndarray]:
    """See `Assigner`."""
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
    method: 'exact' = Plain. 'auto' = Screened on CPUs where the clustering is
      large enough to gain by it, else Plain.
    chunks: of the rows.
    num_centers: K.
    iteration: number of iterations that are done.
    saved: name and state of the assigner that did these. A state of another
      kind of assigner is not used.

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
