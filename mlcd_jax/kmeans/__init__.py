"""Spherical k-means on a mesh, and the exact labels of every row.

Code outside this package imports the package, not the files in it.

  from mlcd_jax import kmeans
  fit = kmeans.fit(embeddings, num_centers=1000, iterations=20, seed=0)
  labels, scores = kmeans.nearest_centers(embeddings, fit.centers, num_labels=8)

Rows are split over the mesh axis "data" and centers over "fsdp". A score is the
product of a row and a center. Scores exist one tile at a time, never as an
array [N, K] of all rows and centers. Tiles have a fixed shape, and among equal
scores the center with the lowest number wins, so one exact pass gives the same
labels on every mesh.

  lloyd      the loop: first centers, passes, empty clusters
  assign     the interface of a pass, the exact pass, the choice of a method
  programs   the compiled programs of a pass
  chunks     the transfer of rows to the devices, from memory or disk
  tiles      the shape of score tiles, padding, the type of scores
  search     the search for the best center of each row
  nearest    the exact nearest centers of each row
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
from mlcd_jax.kmeans.nearest import nearest_in_chunks
from mlcd_jax.kmeans.programs import abstract_pass
from mlcd_jax.kmeans.pursuit import pursue
from mlcd_jax.kmeans.pursuit import pursue_in_chunks

__all__ = [
  'Fit',
  'abstract_pass',
  'fit',
  'held_bytes',
  'iterate',
  'nearest_centers',
  'nearest_in_chunks',
  'pursue',
  'pursue_in_chunks',
  'two_level',
]
