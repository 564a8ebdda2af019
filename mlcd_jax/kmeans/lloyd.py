"""Lloyd's iterations of spherical k-means on the mesh.

Shapes: N points, K centers, D dimensions, P leading dimensions.
"""

from collections.abc import Mapping
import os
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import activity
from mlcd_jax import carried_sums
from mlcd_jax import lloyd_programs as programs
from mlcd_jax import nearest
from mlcd_jax import points
from mlcd_jax import screening
from mlcd_jax import widths

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
    carried: what the next iteration starts from, if that is anything.
    known: what the next iteration knows of where labels can change, on CPUs;
      see activity.py and screening.py.
  """

  centers: np.ndarray
  objective: list[float]
  counts: np.ndarray
  reseeded: list[int]
  skipped: int
  bad_rows: list[int]
  carried: carried_sums.Sums | None = None
  known: Mapping[str, np.ndarray] = types.MappingProxyType({})


class Lloyd:
  """A clustering that can be iterated.

  Attributes:
    done: the iterations so far, without the centers and what `state` adds.
  """

  def __init__(
    self,
    embeddings: points.Rows,
    mesh: Mesh,
    start: Fit,
    *,
    score_dtype: jnp.dtype,
    screens: bool,
  ):
    """Goes on from a start.

    Args:
      embeddings: [N, D].
      mesh: of all devices.
      start: its centers [K, D] and what has been done with them.
      score_dtype: of the products' operands.
      screens: score on leading dimensions on CPUs, where that pays.
    """
    self.done = start
    self._embeddings = embeddings
    self._mesh = mesh
    self._num_centers, dim = start.centers.shape
    tile = nearest.tile_shape(mesh, self._num_centers)[0]
    self._chunks = points.Points(embeddings, mesh, tile=tile, hold=True)
    sample = widths.Sample(embeddings, self._num_centers, score_dtype)
    self._mean = sample.mean
    self._add = programs.make_add(mesh, self._num_centers, score_dtype)
    self._known = None
    if nearest.on_cpu(mesh):
      screens &= widths.pay(*embeddings.shape, self._num_centers)
      if screens and (not start.known or 'ids_nC' in start.known):
        self._known = screening.Screening(
          mesh, sample, self._chunks, start=start
        )
      else:
        if 'basis' in start.known:
          # Its pass was screened, so that a plain one begins anew.
          self.done = start = start._replace(carried=None, known={})
        self._known = activity.Activity(
          mesh,
          self._num_centers,
          self._chunks,
          mean=sample.mean,
          score_dtype=score_dtype,
          known=start.known,
        )
    self._centers = nearest.put_centers(start.centers, mesh)
    # Sums and counts that the next pass starts from.
    self._begun = None
    # Chunks that may be on their way while the next one is read. Each core of a
    # CPU can search one, which together is faster than one on all cores.
    self._ahead = min(8, os.cpu_count() or 1) if self._known else 1

  def state(self) -> Fit:
    """All that is needed to go on, on the host."""
    centers = nearest.to_host(self._centers)[: self._num_centers]
    known = self._known.state() if self._known else {}
    carried = self.done.carried
    if self._begun:
      carried = carried_sums.to_host(*self._begun, self._num_centers)
    return self.done._replace(centers=centers, carried=carried, known=known)

  def iterate(self) -> None:
    """One pass over the points, and the new centers.

    Raises:
      ValueError: more centers than usable rows.
    """
    *sums, cosines = self._pass()
    self._centers, total, counts, shift = programs.make_update(self._mesh)(
      self._centers, *sums
    )
    counts = nearest.to_host(counts)[: self._num_centers]
    usable = int(counts.sum())
    if self._num_centers > usable:
      raise ValueError(
        f'{self._num_centers} centers need as many rows; there are {usable} of '
        f'{self._embeddings.shape[0]} that are finite and not zero'
      )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
      self._replace(empty, self._worst(cosines)[1][: len(empty)])
    if self._known:
      shift = nearest.to_host(shift)[: self._num_centers].copy()
      shift[empty] = np.inf
      self._known.finish(shift, self._centers)
    self.done = self.done._replace(
      counts=counts,
      objective=[*self.done.objective, float(total) / usable],
      reseeded=[*self.done.reseeded, len(empty)],
      skipped=self._embeddings.shape[0] - usable,
      carried=None,
    )
    if self._known and self._known.is_quick:
      self._begun = carried_sums.merged(*sums)

  def _pass(self):
    """Sums, counts, and cosines of the chunks."""
    looks = bool(self._known) and self._known.begin(self._centers)
    sums, counts = self._first_sums(looks and self._known.is_quick)
    cosines, num_bad = {}, {}
    for i, x_nD in enumerate(self._chunks):
      if looks:
        found = self._known.add(sums, counts, i, x_nD)
      else:
        label_n, score_n, *found = self._add(
          self._centers, self._mean, sums, counts, x_nD
        )
        if self._known:
          self._known.keep(i, label_n, score_n)
      sums, counts, cosines[i], num_bad[i] = found
      jax.block_until_ready(cosines.get(i - self._ahead))
    self._name_bad_rows(num_bad)
    return sums, counts, cosines

  def _first_sums(self, is_quick: bool):
    """Sums and counts that a pass starts from."""
    begun, self._begun = self._begun, None
    if is_quick:
      return begun or carried_sums.to_devices(self.done.carried, self._mesh)
    return programs.make_zeros(self._mesh, *self._centers.shape)()

  def _name_bad_rows(self, num_bad: dict[int, jax.Array]) -> None:
    """Looks for bad rows in the first pass, only where there are some."""
    bad_rows = self.done.bad_rows
    for i, num in num_bad.items():
      if self.done.objective or len(bad_rows) >= _MAX_NAMED:
        return
      start, stop = self._chunks.rows_of(i)
      if int(num) > self._chunks.chunk - (stop - start):
        bad_rows = (bad_rows + self._chunks.bad_rows(i))[:_MAX_NAMED]
        self.done = self.done._replace(bad_rows=bad_rows)

  def _worst(self, cosines) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows farthest from their centers, the farthest first.

    Among equals the lower row comes first; what exceeds the limit waits for the
    next iteration.
    """
    found_scores, found_rows = [], []
    for i, score_n in cosines.items():
      lowest = programs.lowest(score_n, min(len(score_n), _MAX_RESEEDED))
      score, place = map(nearest.to_host, lowest)
      usable = np.isfinite(score)  # Padding and bad rows are inf.
      found_scores.append(score[usable])
      first = self._chunks.rows_of(i)[0]
      found_rows.append(first + place[usable].astype(np.int64))
    found_scores = np.concatenate(found_scores)
    order = np.argsort(found_scores, kind='stable')[:_MAX_RESEEDED]
    return found_scores[order], np.concatenate(found_rows)[order]

  def _replace(self, centers: np.ndarray, rows: np.ndarray) -> None:
    """Puts rows in the place of the first of some centers."""
    # Out of bounds where there is nothing to replace.
    ids = np.full(_MAX_RESEEDED, len(self._centers), np.int32)
    ids[: len(rows)] = centers[: len(rows)]
    new = np.zeros((_MAX_RESEEDED, self._centers.shape[1]), np.float32)
    new[: len(rows)] = points.unit_rows_at(self._embeddings, rows)
    self._centers = programs.make_replace(self._mesh)(self._centers, ids, new)
