"""Matching pursuit: the centers that add up to each row, exact in float32.

The nearest centers of a row resemble each other. Matching pursuit subtracts
from the row what a center explains of it before it searches for the next
center. So the next center explains another part of the row.

Shapes: N rows, K centers, D dimensions, n rows of a chunk, T rows of a tile, L
labels of a row. Upper case is global, lower case this device's part.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import nearest
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# Stored embeddings may be float16. That rounding moves a unit row by at most
# 2^-11 = 4.9e-4, so it changes no product with a center by more. A product
# above 1e-3 is therefore due to the row and not to the rounding.
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
  """Finds centers whose positive multiples add up to each row.

  This is matching pursuit (Mallat and Zhang, "Matching pursuits with
  time-frequency dictionaries", 1993) with positive coefficients. The residual r
  of a row starts as the unit row. Each step finds the center c with the largest
  product r c among those that are no label of the row yet. It makes c the next
  label, with the coefficient r c, and subtracts (r c) c from r. So the first
  label is the nearest center.

  A row gets no more labels once the largest product is `min_gain` or less. The
  method of the paper differs in two ways. It also takes centers with negative
  products; here a center that points away from the residual is no part of the
  image. And it may take a center again, which corrects its coefficient after
  others were subtracted; here each center is taken at most once, since taking
  it again would add no label. So there are at most L steps.

  Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad, 1993) computes
  the coefficients of all labels anew in every step. It is not used here. In
  every step it would need the centers of all labels, [T, L, D] from all
  devices, and would solve a least-squares problem for each row. The result here
  is which centers are taken, not how well their sum fits the row. The new
  coefficients could also become negative. For orthogonal centers both methods
  give the same labels.

  A mean that all rows share is part of every center. The first center then
  explains all of it, the products of the residual with most centers become
  negative, and rows run out of labels early. Subtract the mean of the centers
  from rows and centers before.

  Args:
    embeddings: the rows [N, D]; they need not be unit rows.
    centers: the centers [K, D]; they need not be unit rows.
    num_labels: L, at most K.
    mesh: the mesh of all devices; by default the rows are split over all of
      JAX's devices.
    min_gain: the product that a center must exceed to become a label, at least
      0. A step lowers the squared length of the residual, which is 1 at first,
      by the square of the product.

  Returns:
    The labels, int32 [N, L], in the order in which they were found, followed by
    -1 if there are fewer than L; and their coefficients, float32 [N, L], 0
    where the label is -1. Among equal products the center with the lower number
    is taken. The coefficients need not descend. A row that is zero or not
    finite has no labels.

  Raises:
    ValueError: there are fewer centers than labels, rows and centers differ in
      dimensions, or `min_gain` is below 0.
  """
  mesh = mesh or sharding.make_mesh()
  chunks = pursue_in_chunks(
    embeddings, centers, num_labels, mesh=mesh, min_gain=min_gain
  )
  return nearest.joined(chunks, embeddings.shape[0], num_labels)


def pursue_in_chunks(
  embeddings: unit.Rows,
  centers: np.ndarray,
  num_labels: int,
  *,
  mesh: Mesh,
  min_gain: float = _MIN_GAIN,
) -> Iterator[nearest.Found]:
  """Yields what `pursue` returns for consecutive chunks of rows."""
  if not min_gain >= 0:
    raise ValueError(f'min_gain={min_gain} is below 0')
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
  """Makes the program that finds the labels of the rows of a chunk.

  The program takes padded centers [K, D] and a chunk [n, D]. It returns the
  coefficients and the labels, both [n, L]. Padding needs no mask: its products
  are 0 and never exceed `min_gain`.
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
  return programs.on_mesh(look_up, mesh, (sharding.CENTERS, rows), (rows, rows))


def _best_new_center(c_kD, r_nD, named_nL, tile):
  """Finds the best of this device's centers that is no label of the row yet.

  Subtracting a center makes the residual's product with it 0. Later steps can
  raise this product again, if they subtract centers that point away from it,
  but it is rarely the largest. So the first search of all rows ignores the
  labels. Only rows whose best center is a label are searched again without
  their labels.

  Args:
    c_kD: this device's centers.
    r_nD: the residuals.
    named_nL: the labels of the rows so far, as places in `c_kD`; numbers that
      are no place in it are ignored.
    tile: how many rows and how many centers are scored at once.

  Returns:
    The best product of each row [n], and the place of its center [n].
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
  """Subtracts from each residual its new label's center times the coefficient.

  Each device contributes the centers that it has to a sum [T, D], so devices
  exchange no other centers.
  """
  place_T1 = label_T1 - lax.axis_index('fsdp') * len(c_kD)
  is_here_T1 = (place_T1 >= 0) & (place_T1 < len(c_kD))
  c_TD = c_kD.at[place_T1[:, 0]].get(mode='clip')
  c_TD = lax.psum(jnp.where(is_here_T1, c_TD, 0), 'fsdp')
  return r_TD - score_T1 * c_TD
