"""Spherical k-means on a mesh, and the exact labels of every row.

Others import this package and no file in it.

  from mlcd_jax import kmeans
  fit = kmeans.fit(embeddings, num_centers=1000, iterations=20, seed=0)
  labels, scores = kmeans.nearest_centers(embeddings, fit.centers, num_labels=8)

Rows are split over the mesh axis "data" and centers over "fsdp". Scores exist
one tile at a time, never as an [N, K] array. Tiles have a fixed shape and ties
go to the center with the lower number, so that one exact pass gives the same
labels on every mesh.

  lloyd      the loop: first centers, passes, empty clusters
  assign     the interface of a pass, the exact pass, and the choice of a method
  passes     the compiled parts of a pass
  chunks     rows onto the devices, from memory or disk
  tiles      shapes of score tiles, padding, type of the scores
  search     the best center of every row of a tile
  nearest    the exact nearest centers of every row
  pursuit    the centers that add up to each row, by matching pursuit
  two_level  coarse centers first, then each coarse cell by itself
  fast/      approximate passes for CPUs
"""

from mlcd_jax.kmeans import two_level
from mlcd_jax.kmeans.chunks import held_bytes
from mlcd_jax.kmeans.lloyd import Fit
from mlcd_jax.kmeans.lloyd import fit
from mlcd_jax.kmeans.lloyd import iterate
from mlcd_jax.kmeans.nearest import nearest_centers
from mlcd_jax.kmeans.passes import abstract_pass
from mlcd_jax.kmeans.pursuit import pursue

__all__ = [
  'Fit',
  'abstract_pass',
  'fit',
  'held_bytes',
  'iterate',
  'nearest_centers',
  'pursue',
  'two_level',
]
