"""Matching pursuit: the centers that add up to each row, exact in float32.

The nearest centers of a row resemble each other. Pursuit subtracts what a
center explains before it looks for the next one, so that the next one explains
another part of the row.

Shapes: N rows, K centers, D dimensions, n rows of a chunk, T rows of a tile, L
labels of a row. Upper case is global, lower case this device's part.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import nearest
from mlcd_jax.kmeans import passes
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# Rounding to float16 moves a unit row by at most 2^-11 = 4.9e-4, and no product
# of that error with a center is larger. A center whose product is above 1e-3 is
# therefore named for the row, not for the rounding of stored embeddings.
# Bfloat16 moves a row by 2^-8 = 3.9e-3 at most.
_MIN_GAIN = 1e-3


def pursue(
  embeddings: unit.Rows,
  centers: np.ndarray,
  num_labels: int = 8,
  *,
  mesh: Mesh | None = None,
  min_gain: float = _MIN_GAIN,
) -> tuple[np.ndarray, np.ndarray]:
  """Names centers whose positive multiples add up to each row.

  This is matching pursuit (Mallat and Zhang, "Matching pursuits with
  time-frequency dictionaries", 1993) with positive coefficients. The residual
  r of a row is the unit row at first. Each step takes the center c with the
  largest product r c among those that the row has not got yet, and subtracts
  (r c) c from r. The first label is the nearest center.

  A row gets no more labels once the largest product is `min_gain` or less. So
  every label has a positive coefficient: a center that points away from the
  residual is no part of the image. The original also takes centers with
  negative products, and may take a center again to correct its coefficient
  after others were subtracted. A second time would add no label, so here each
  center is named at most once, and at most L steps are made.

  Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad, 1993) fits the
  coefficients of all centers named so far anew in every step. That is not done
  because it needs all of them in every step, [T, L, D] from all devices, and a
  least-squares problem a row, while the labels are only which centers are
  taken, not how well their sum fits. Refitted coefficients may also become
  negative. For centers that are orthogonal both are the same.

  A mean that all rows share is part of every center. The first center then
  explains all of it, the products of the residual with most centers become
  negative, and rows run out of labels early. Subtract the mean of the centers
  from rows and centers before.

  Args:
    embeddings: [N, D]; they need not be unit rows.
    centers: [K, D]; they need not be unit rows.
    num_labels: L, at most K.
    mesh: all devices, with rows split over them, where not given.
    min_gain: the product that a center must exceed to become a label, at least
      0. A step lowers the squared length of the residual, 1 at first, by the
      square of the product.

  Returns:
    Labels int32 [N, L] in the order in which they were taken, ties to the lower
    number, then -1; and the products r c at that time float32 [N, L], 0 where
    the label is -1. They need not descend. A row that is zero or not finite has
    no labels.

  Raises:
    ValueError: there are fewer centers than labels, rows and centers differ in
      dimensions, or `min_gain` is below 0.
  """
  if not min_gain >= 0:
    raise ValueError(f'min_gain={min_gain} is below 0')
  mesh = mesh or sharding.make_mesh()
  look_up = _make_pursuit(
    mesh, tiles.tile_shape(mesh, len(centers)), num_labels, float(min_gain)
  )
  return nearest.look_up_all(
    look_up, embeddings, centers, num_labels, mesh=mesh
  )


@functools.cache
def _make_pursuit(
  mesh: Mesh, tile: tuple[int, int], num_labels: int, min_gain: float
) -> Callable:
  """Makes: centers, a chunk [n, D] -> coefficients and labels, both [n, L].

  Padding needs no mask: its products are 0, so that it is never named.
  """

  def look_up(c_kD, x_nD):
    first = lax.axis_index('fsdp') * len(c_kD)

    def step(carry, i):
      r_nD, labels_nL = carry
      score_n, place_n = _best_new_center(c_kD, r_nD, labels_nL - first, tile)
      score_n1, center_n1 = search.merge_devices(
        score_n[:, None], first + place_n[:, None], 1
      )
      is_named_n1 = score_n1 > min_gain
      score_n1 = jnp.where(is_named_n1, score_n1, 0)
      label_n1 = jnp.where(is_named_n1, center_n1, -1)
      r_nD = search.map_tiles(
        lambda *rows: _subtract(c_kD, *rows), tile[0], r_nD, label_n1, score_n1
      )
      labels_nL = lax.dynamic_update_slice(labels_nL, label_n1, (0, i))
      return (r_nD, labels_nL), score_n1[:, 0]

    nothing = jnp.full((len(x_nD), num_labels), -1, jnp.int32)
    steps = jnp.arange(num_labels, dtype=jnp.int32)
    (_, labels_nL), score_Ln = lax.scan(step, (x_nD, nothing), steps)
    return score_Ln.T, labels_nL

  rows = sharding.POINTS
  return passes.on_mesh(look_up, mesh, (sharding.CENTERS, rows), (rows, rows))


def _best_new_center(c_kD, r_nD, named_nL, tile):
  """Returns the best score [n] and its place among the centers not named yet.

  The product of a residual with a named center is 0 at first. It becomes the
  largest again only if a center that points away from the named one was
  subtracted since. So all rows are searched without a mask, and these few again
  with one.
  """
  options = dict(tile=tile, precision=lax.Precision.HIGHEST)
  score_n, place_n = search.best_center(c_kD, r_nD, **options)

  def search_again(rows, old):
    del old
    return search.best_center(
      c_kD, r_nD[rows], left_out_nL=named_nL[rows], **options
    )

  is_named_n = jnp.any(named_nL == place_n[:, None], axis=1)
  return search.redo(search_again, is_named_n, (score_n, place_n), tile[0])


def _subtract(
  c_kD: jax.Array, r_TD: jax.Array, label_T1: jax.Array, score_T1: jax.Array
) -> jax.Array:
  """Subtracts from each row its multiple of the center that it got.

  Each device adds the centers that it holds to a sum [T, D], so that no other
  centers move.
  """
  place_T1 = label_T1 - lax.axis_index('fsdp') * len(c_kD)
  is_here_T1 = (place_T1 >= 0) & (place_T1 < len(c_kD))
  c_TD = c_kD.at[place_T1[:, 0]].get(mode='clip')
  c_TD = lax.psum(jnp.where(is_here_T1, c_TD, 0), 'fsdp')
  return r_TD - score_T1 * c_TD
