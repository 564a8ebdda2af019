"""Sizes that follow from the number of images."""

import pytest

from mlcd_jax.config import sizes


@pytest.mark.parametrize(
  ('num_images', 'num_centers'),
  [
    (1_281_167, 320_291),  # Of MLCD Table 12, 320,000 are the best.
    (389_737_314, 1_000_000),  # The paper's own number (Table 5a).
    (5_000, 1_250),
    (30, 10),  # As many as the labels of an image.
    (7, 7),  # The cluster stage names what is missing.
  ],
)
def test_one_center_for_every_four_images(tiny_config, num_images, num_centers):
  tiny_config.cluster.num_centers = 0
  assert tiny_config.cluster.num_labels == 10
  assert sizes.num_centers(tiny_config, num_images) == num_centers


def test_a_number_of_ones_own_stays(tiny_config):
  assert sizes.num_centers(tiny_config, 10**9) == 64
