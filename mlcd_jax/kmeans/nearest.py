"""The search for the nearest centers of every row, exact in float32.

CPUs with fast products of bfloat16 score all centers in bfloat16 first. The
centers with the best scores are the row's candidates, and these are scored
again in float32. A bound on the rounding errors of bfloat16 then tells for
which rows a center outside the candidates could still be nearer. These few rows
are scored against all centers in float32. On other devices all scores are
float32.

Shapes: N rows, K centers, D dimensions, n rows of a chunk, T rows and t centers
of a tile, L labels and M candidates of a row, B buckets of centers, R centers
of a bucket, C = R M centers of a row's best buckets. Upper case is global,
lower case this device's part.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import functools

from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import chunks as chunks_lib
from mlcd_jax.kmeans import programs
from mlcd_jax.kmeans import search
from mlcd_jax.kmeans import tiles

# Labels int32 [n, L] and scores float32 [n, L] of the rows of a chunk.
Found = tuple[np.ndarray, np.ndarray]

# A row has at least this many more candidates than labels. With fewer, more
# rows would need a search in float32.
_SPARE = 8

# The number of candidates is a multiple of 16, the floats in a vector of a CPU:
# the product takes as long for any smaller number.
_CANDIDATES_MULTIPLE = 16

# With fewer centers a plain search is as fast.
_MIN_CENTERS = 1_024

# Rows of a tile of float32 scores. With more rows the scores leave the cache.
_TILE_ROWS = 64

# Scores of a tile of the search in bfloat16. They take 2 MiB as float32 and
# stay in the cache.
_TILE_SCORES = 2**19

# Centers are dealt to this many buckets, and only the buckets with the largest
# maxima are sorted. The maxima cost far less than sorting all scores.
_BUCKETS = 256


def nearest_centers(
  embeddings: unit.Rows,
  centers: np.ndarray,
  num_labels: int = 8,
  *,
  mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the nearest centers of every row, exact in float32.

  Args:
    embeddings: the rows [N, D]; they need not be unit rows.
    centers: the centers [K, D]; they need not be unit rows.
    num_labels: L, at most K.
    mesh: the mesh of all devices; by default the rows are split over all of
      JAX's devices.

  Returns:
    The labels, int32 [N, L], and their cosines, float32 [N, L], the nearest
    first. Among equals the center with the lower number comes first. A row that
    is zero or not finite has the cosine 0 to every center.

  Raises:
    ValueError: there are fewer centers than labels, or rows and centers differ
      in dimensions.
  """
  mesh = mesh or sharding.make_mesh()
  chunks = nearest_in_chunks(embeddings, centers, num_labels, mesh=mesh)
  return joined(chunks, embeddings.shape[0], num_labels)


def nearest_in_chunks(
  embeddings: unit.Rows, centers: np.ndarray, num_labels: int, *, mesh: Mesh
) -> Iterator[Found]:
  """Yields what `nearest_centers` returns for consecutive chunks of rows.

  The centers are put onto the devices once, and only one chunk is in memory.
  """
  look_up = make_lookup(mesh, len(centers), num_labels)
  return look_up_all(look_up, embeddings, centers, num_labels, mesh=mesh)


def look_up_all(
  look_up: Callable,
  embeddings: unit.Rows,
  centers: np.ndarray,
  num_labels: int,
  *,
  mesh: Mesh,
) -> Iterator[Found]:
  """Finds the labels of all rows, one chunk after the other.

  Args:
    look_up: a program that takes padded centers [K, D] and a chunk [n, D], and
      returns scores and labels, both [n, L].
    embeddings: the rows [N, D]; they need not be unit rows.
    centers: the centers [K, D]; they need not be unit rows.
    num_labels: L.
    mesh: the mesh of all devices.

  Returns:
    An iterator over the chunks of the rows, in order.

  Raises:
    ValueError: there are fewer centers than labels, or rows and centers differ
      in dimensions.
  """
  if num_labels > len(centers):
    raise ValueError(f'{num_labels} labels from {len(centers)} centers')
  if centers.shape[1] != embeddings.shape[1]:
    raise ValueError(
      f'rows have {embeddings.shape[1]} dimensions, centers {centers.shape[1]}'
    )

  def found():
    c_KD = tiles.put_centers(unit.unit_rows(np.asarray(centers)), mesh)
    tile = tiles.tile_shape(mesh, len(centers))[0]
    chunks = chunks_lib.Chunks(embeddings, mesh, tile=tile, hold=False)
    for i, x_nD in enumerate(chunks):
      start, stop = chunks.rows_of(i)
      score_nL, center_nL = look_up(c_KD, x_nD)
      yield (
        sharding.to_host(center_nL)[: stop - start],
        sharding.to_host(score_nL)[: stop - start],
      )

  return found()


def joined(
  chunks: Iterable[Found], num_rows: int, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns labels int32 [N, L] and scores float32 [N, L] of all chunks."""
  labels = np.zeros((num_rows, num_labels), np.int32)
  scores = np.zeros(labels.shape, np.float32)
  start = 0
  for label_nL, score_nL in chunks:
    rows = slice(start, start + len(label_nL))
    labels[rows], scores[rows] = label_nL, score_nL
    start = rows.stop
  return labels, scores


def make_lookup(
  mesh: Mesh,
  num_centers: int,
  num_labels: int,
  *,
  spare: int = _SPARE,
  score_dtype: jnp.dtype | None = None,
) -> Callable:
  """Makes the program that finds the nearest centers of the rows of a chunk.

  The program takes centers [K, D] with padding and a chunk [n, D]. It returns
  the cosines to the nearest centers and the numbers of these, both [n, L].

  Args:
    mesh: the mesh of all devices.
    num_centers: K without padding.
    num_labels: L.
    spare: the least number of candidates beyond the labels.
    score_dtype: the type that rows and centers are rounded to for the scores
      that choose candidates; `tiles.score_dtype` by default.
  """
  count = tiles.round_up(num_labels + spare, _CANDIDATES_MULTIPLE)
  many = count > _BUCKETS // 4
  if not sharding.on_cpu(mesh) or num_centers < _MIN_CENTERS or many:
    return _make_plain(mesh, num_centers, num_labels)
  dtype = jnp.dtype(score_dtype or tiles.score_dtype(mesh))
  if dtype == jnp.bfloat16:
    return _make_rescored(mesh, num_centers, num_labels, count)
  return _make_bucketed(mesh, num_centers, num_labels, count)


def _on_mesh(look_up: Callable, mesh: Mesh) -> Callable:
  """Compiles a function that takes one device's centers and rows."""
  centers, rows = sharding.CENTERS, sharding.POINTS
  return programs.on_mesh(look_up, mesh, (centers, rows), (rows, rows))


@functools.cache
def _make_bucketed(mesh, num_centers, num_labels, count):
  """Makes the program for CPUs that chooses candidates by float32 scores."""

  def look_up(c_kD, x_nD):
    c_KD = lax.all_gather(c_kD, 'fsdp', tiled=True)

    def tile(x_TD):
      _, ids_TM = _candidates(c_KD, x_TD, num_centers, count)
      return _rescore(c_KD, x_TD, ids_TM, num_labels)

    return search.map_tiles(tile, _TILE_ROWS, x_nD)

  return _on_mesh(look_up, mesh)


@functools.cache
def _make_rescored(mesh, num_centers, num_labels, count):
  """Makes the program for CPUs that chooses candidates by bfloat16 scores."""

  def look_up(c_kD, x_nD):
    c_KD = lax.all_gather(c_kD, 'fsdp', tiled=True)
    mean_D = jnp.sum(c_KD, axis=0) / num_centers
    # Subtracting the mean of the centers changes all scores of a row by the
    # same amount, so their order stays. Shorter centers round with less error.
    centered_KD = c_KD - mean_D[None]
    low_KD = centered_KD.astype(jnp.bfloat16)
    tile_rows = max(8, min(256, _TILE_SCORES // len(c_KD)))
    tile_rows = 1 << (tile_rows.bit_length() - 1)
    max_norm = jnp.max(_norm(centered_KD))
    max_error = jnp.max(_norm(centered_KD - low_KD.astype(jnp.float32)))

    def search_exactly(rows, old):
      del old
      x_TD = x_nD[rows]
      _, ids_TM = _candidates(c_KD, x_TD, num_centers, count)
      return *_rescore(c_KD, x_TD, ids_TM, num_labels), jnp.zeros_like(rows)

    def tile(x_TD):
      low_TD = x_TD.astype(jnp.bfloat16)
      s_TM, ids_TM = _candidates(low_KD, low_TD, num_centers, count)
      score_TL, ids_TL = _rescore(c_KD, x_TD, ids_TM, num_labels)
      # By Cauchy-Schwarz the first two terms bound how much the rounding of the
      # row and of a center changes a score. The last term bounds the rounding
      # of the sums.
      rounded_TD = low_TD.astype(jnp.float32)
      bound_T = (
        _norm(x_TD - rounded_TD) * max_norm
        + _norm(rounded_TD) * max_error
        + 4 * x_TD.shape[1] * jnp.finfo(jnp.float32).eps
      )
      # A center outside the candidates scored at most as well as the last
      # candidate. If its true score may reach that of the last label, the row
      # is searched in float32.
      last_T = score_TL[:, -1] - x_TD @ mean_D
      in_doubt_T = last_T <= s_TM[:, -1] + bound_T
      return score_TL, ids_TL, in_doubt_T.astype(int)

    results = search.map_tiles(tile, tile_rows, x_nD)
    return search.redo(search_exactly, results[2] > 0, results, tile_rows)[:2]

  return _on_mesh(look_up, mesh)


def _candidates(c_KD, x_TD, num_centers, count):
  """Finds the candidates of the rows of a tile.

  Center number r * B + b is row r of bucket b. The largest scores lie in the
  buckets with the largest maxima, so only `count` buckets are sorted.

  Args:
    c_KD: the centers with padding, in the type of the scores.
    x_TD: the rows, in the same type.
    num_centers: K without padding.
    count: M.

  Returns:
    The `count` largest scores and the numbers of their centers, both [T, M].
  """
  s_KT = search.scores(c_KD, x_TD, lax.Precision.HIGHEST)
  if num_centers < len(c_KD):
    center = lax.broadcasted_iota(jnp.int32, s_KT.shape, 0)
    s_KT = jnp.where(center < num_centers, s_KT, -jnp.inf)
  s_RBT = s_KT.reshape(-1, _BUCKETS, len(x_TD))
  _, bucket_TM = lax.top_k(jnp.max(s_RBT, axis=0).T, count)
  s_RMT = jnp.take_along_axis(s_RBT, bucket_TM.T[None], axis=1)
  s_TC = s_RMT.transpose(2, 0, 1).reshape(len(x_TD), -1)
  score, place = lax.top_k(s_TC, count)
  bucket = jnp.take_along_axis(bucket_TM, place % count, axis=1)
  return score, place // count * _BUCKETS + bucket


def _rescore(c_KD, x_TD, ids_TM, num_labels):
  """Returns the float32 cosines and numbers of the L best candidates [T, L]."""
  # top_k keeps the earlier of equals, which must be the lower center.
  ids_TM = jnp.sort(ids_TM, axis=1)
  s_TM = search.tiled_cosines(x_TD, c_KD, ids_TM)
  score_TL, place_TL = lax.top_k(s_TM, num_labels)
  return score_TL, jnp.take_along_axis(ids_TM, place_TL, axis=1)


def _norm(rows):
  return jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))


@functools.cache
def _make_plain(mesh: Mesh, num_centers: int, num_labels: int):
  """Makes the program that scores one tile of centers after the other.

  All scores are float32. The program works on all kinds of devices.
  """
  tile_rows, tile_centers = tiles.tile_shape(mesh, num_centers)

  def look_up(c_kD, x_nD):
    k, dim = c_kD.shape
    offset = lax.axis_index('fsdp') * k
    starts = offset + jnp.arange(0, k, tile_centers, dtype=jnp.int32)
    c_tiles = c_kD.reshape(-1, tile_centers, dim)

    def search_rows(x_TD):
      def merge_tile(best, start_and_tile):
        start, c_tD = start_and_tile
        s_Tt = _masked_scores(c_tD, x_TD, start, num_centers).T
        center = start + lax.broadcasted_iota(jnp.int32, s_Tt.shape, 1)
        # The best so far come first: top_k keeps the earlier of equals.
        scores = jnp.concatenate([best[0], s_Tt], axis=1)
        ids = jnp.concatenate([best[1], center], axis=1)
        score, place = lax.top_k(scores, num_labels)
        return (score, jnp.take_along_axis(ids, place, axis=1)), None

      nothing = (
        jnp.full((tile_rows, num_labels), -jnp.inf, jnp.float32),
        jnp.full((tile_rows, num_labels), num_centers, jnp.int32),
      )
      return lax.scan(merge_tile, nothing, (starts, c_tiles))[0]

    score_nL, center_nL = search.map_tiles(search_rows, tile_rows, x_nD)
    return search.merge_devices(score_nL, center_nL, num_labels)

  return _on_mesh(look_up, mesh)


def _masked_scores(c_kD, x_TD, first_center, num_centers):
  """Returns the cosines [k, T] in float32, -inf for padding."""
  s_kT = search.scores(c_kD, x_TD, lax.Precision.HIGHEST)
  center = first_center + lax.broadcasted_iota(jnp.int32, s_kT.shape, 0)
  return jnp.where(center < num_centers, s_kT, -jnp.inf)
