"""Views of an image: overlapping crops on grids of several sizes.

Shapes: V views, S pixels of a side.
"""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

# A cell is this share larger than the image's side over the grid's size, so
# that an object on the line between two cells is whole in one of them if it is
# small. Not tuned.
_OVERLAP = 0.25


def count(grids: Sequence[int]) -> int:
  """Returns the number V of views of an image."""
  return sum(grid * grid for grid in grids)


def boxes(
  width: int, height: int, grids: Sequence[int]
) -> list[tuple[int, int, int, int]]:
  """Returns the views of an image as (left, top, right, bottom) in pixels.

  A grid of size g has g x g cells of the image's shape. They are evenly spaced;
  the first touches the left and upper border and the last the right and lower
  one. The cell of g = 1 is the whole image.

  Args:
    width: the width of the image.
    height: the height of the image.
    grids: the sizes of the grids.

  Returns:
    V boxes, grid by grid, row by row; right and bottom are exclusive.
  """
  return [
    (left, top, right, bottom)
    for grid in grids
    for top, bottom in _cells(height, grid)
    for left, right in _cells(width, grid)
  ]


def prepare(
  pixels: np.ndarray,
  grids: Sequence[int],
  prepare_image: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Returns an image and its views, prepared for an embedder.

  Args:
    pixels: uint8 [H, W, 3].
    grids: the sizes of the grids.
    prepare_image: resizes an image uint8 [H, W, 3] to uint8 [S, S, 3].

  Returns:
    uint8 [1 + V, S, S, 3], the whole image first.
  """
  height, width = pixels.shape[:2]
  crops = [
    pixels[top:bottom, left:right]
    for left, top, right, bottom in boxes(width, height, grids)
  ]
  return np.stack([prepare_image(crop) for crop in (pixels, *crops)])


def _cells(side: int, grid: int) -> list[tuple[int, int]]:
  """Returns the (first, last) pixels of a grid's cells on a side."""
  if grid == 1:
    return [(0, side)]
  size = min(side, max(1, round(side / grid * (1 + _OVERLAP))))
  starts = [round(i * (side - size) / (grid - 1)) for i in range(grid)]
  return [(start, start + size) for start in starts]
