"""Clusterings with parts that `kmeans.fit` does not let one choose."""

import jax
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax.kmeans import assign
from mlcd_jax.kmeans import chunks as chunks_lib
from mlcd_jax.kmeans import lloyd
from mlcd_jax.kmeans import tiles


def plain(score_dtype=None):
  """Makes exact assigners with this type of scores."""

  def make(chunks, num_centers):
    return assign.Plain(
      chunks.mesh,
      num_centers,
      mean=chunks.sample().mean,
      score_dtype=score_dtype,
    )

  return make


def auto(chunks, num_centers):
  """Makes the assigner that `kmeans.fit` chooses."""
  return assign.choose('auto', chunks, num_centers)


def states(
  x,
  num_centers,
  *,
  iterations,
  assigner=auto,
  seed=0,
  init=None,
  mesh=None,
  chunk=None,
  hold=True,
) -> list[kmeans.Fit]:
  """Returns the clustering after each iteration."""
  mesh = mesh or sharding.make_mesh()
  tile = tiles.tile_shape(mesh, num_centers)[0]
  chunks = chunks_lib.Chunks(x, mesh, tile=tile, hold=hold, chunk=chunk)
  centers = lloyd.first_centers(x, num_centers, seed, init)
  start = kmeans.Fit(centers, [], np.zeros(num_centers, np.int32), [], 0, [])
  run = lloyd.Lloyd(chunks, assigner(chunks, num_centers), start)
  found = []
  for _ in range(iterations):
    run.step()
    found.append(run.state())
  return found


def assert_same(found: kmeans.Fit, expected: kmeans.Fit) -> None:
  """That two clusterings, and what they go on from, have the same bits."""
  a, b = (
    fit._asdict() | {'assigner_state': dict(fit.assigner_state)}
    for fit in (found, expected)
  )
  assert a.pop('assigner') == b.pop('assigner')
  jax.tree.map(np.testing.assert_array_equal, a, b)
