"""Sizes that follow from the number of images."""

import ml_collections

# Of 500 to 500,000 classes of ImageNet's 1,281,167 images, 320,000 give the
# best linear probe (MLCD Table 12).
_IMAGES_PER_CENTER = 4

# The most that the paper tried: of its 389.7M images, and the best of its
# Table 5a.
_MAX_CENTERS = 1_000_000


def num_centers(config: ml_collections.ConfigDict, num_images: int) -> int:
  """Returns the number of centers.

  It is cluster.num_centers. If that is 0, it is one for every 4 images: at most
  1,000,000, and at least the labels stored for an image.

  Args:
    config: the config of the run.
    num_images: the number of images that are embedded.
  """
  if config.cluster.num_centers:
    return config.cluster.num_centers
  chosen = min(num_images // _IMAGES_PER_CENTER, _MAX_CENTERS)
  return min(num_images, max(chosen, config.cluster.num_labels))


def num_steps(config: ml_collections.ConfigDict, num_images: int) -> int:
  """Returns the number of steps of the whole run.

  It is train.steps. If that is 0, it is train.epochs of the images, and at
  least train.min_steps.

  Args:
    config: the config of the run.
    num_images: the number of images in an epoch.
  """
  train = config.train
  if train.steps:
    return train.steps
  return max(
    1, round(train.epochs * num_images / train.batch_size), train.min_steps
  )
