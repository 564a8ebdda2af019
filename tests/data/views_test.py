"""The boxes of views, against values worked out by hand."""

import numpy as np
import pytest

from mlcd_jax.data import transforms
from mlcd_jax.data import views


def test_a_grid_of_one_is_the_whole_image():
  assert views.boxes(50, 31, (1,)) == [(0, 0, 50, 31)]
  assert views.boxes(50, 31, ()) == []


def test_two_by_two_cells():
  # A cell is 1.25 halves of a side: 50 of 80 pixels and 100 of 160.
  assert views.boxes(80, 160, (2,)) == [
    (0, 0, 50, 100),
    (30, 0, 80, 100),
    (0, 60, 50, 160),
    (30, 60, 80, 160),
  ]


def test_grids_come_in_order_and_rows_before_columns():
  found = views.boxes(96, 96, (3, 1))
  # A cell is 1.25 thirds of 96 pixels, 40; the middle one begins at 28.
  starts = [(left, top) for left, top, _, _ in found[:9]]
  assert starts == [(x, y) for y in (0, 28, 56) for x in (0, 28, 56)]
  assert {(r - x, b - y) for x, y, r, b in found[:9]} == {(40, 40)}
  assert found[9:] == [(0, 0, 96, 96)]
  assert len(found) == views.count((3, 1)) == 10


@pytest.mark.parametrize('side', [1, 2, 3, 7, 28, 100, 641])
@pytest.mark.parametrize('grid', [1, 2, 3, 5])
def test_cells_cover_the_image_evenly(side, grid):
  found = views.boxes(side, 10, (grid,))
  assert len(found) == grid**2
  columns = found[:grid]
  lefts = np.array([left for left, _, _, _ in columns])
  rights = np.array([right for _, _, right, _ in columns])
  assert lefts[0] == 0 and rights[-1] == side
  assert len(set(rights - lefts)) == 1 and (rights > lefts).all()
  assert (lefts[1:] <= rights[:-1]).all()  # No pixel lies between two cells.
  assert np.ptp(np.diff(lefts)) <= 1 if grid > 1 else True


def test_crops_are_prepared_like_the_image():
  pixels = np.arange(12 * 20 * 3).reshape(12, 20, 3).astype(np.uint8)

  def prepare(image):
    return transforms.resize_center_crop(image, 6)

  found = views.prepare(pixels, (2,), prepare)
  assert found.shape == (5, 6, 6, 3) and found.dtype == np.uint8
  # 1.25 halves are 12 of 20 pixels (12.5 rounded to even) and 8 of 12.
  expected = [
    pixels, pixels[:8, :12], pixels[:8, 8:], pixels[4:, :12], pixels[4:, 8:],
  ]  # fmt: skip
  for image, crop in zip(found, expected):
    np.testing.assert_array_equal(image, prepare(crop))
