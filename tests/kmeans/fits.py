"""Comparing clusterings."""

import jax
import numpy as np

from mlcd_jax import kmeans


def assert_same(found: kmeans.Fit, expected: kmeans.Fit) -> None:
  """That two clusterings, and all they know, have the same bits."""
  jax.tree.map(
    np.testing.assert_array_equal,
    *(fit._asdict() | {'known': dict(fit.known)} for fit in (found, expected)),
  )
