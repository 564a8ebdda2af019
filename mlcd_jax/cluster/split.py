"""Choice of the rows that are the first centers and of the held-out rows.

The choice depends on the keys of the rows, not on how they are split into
files. Shapes: N rows, D dimensions.
"""

import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np

from mlcd_jax import unit
from mlcd_jax.data import keys as keys_lib
from mlcd_jax.embed import row_files

# One row in 100 is held out, up to 100,000 rows. Those give the mean cosine to
# about 1e-4.
_HELD_OUT_EVERY = 100
_MAX_HELD_OUT = 100_000

# Rows to read per first center: 5% more than needed, since some may be zero.
_SPARE = 1.05

# Rows per coarse center that k-means++ chooses from.
_SAMPLE = 32


class Chosen(NamedTuple):
  """The rows that the hashes of the keys select.

  Attributes:
    first: the rows that become the first centers, in this order.
    held_out: the held-out rows, ascending.
  """

  first: np.ndarray
  held_out: np.ndarray


class Training:
  """The rows without the held-out ones, as one array read by slices.

  Attributes:
    shape: (N, D), where N leaves out the held-out rows.
  """

  def __init__(self, rows: unit.Rows, held_out: np.ndarray):
    """Takes all rows and the ascending indices of the held-out ones."""
    self._rows = rows
    self._held_out = held_out
    # For each held-out row, the number of training rows before it.
    self._before = held_out - np.arange(len(held_out))
    self.shape = (rows.shape[0] - len(held_out), rows.shape[1])

  def row(self, index: int) -> int:
    """Returns the index among all rows of a training row."""
    return index + int(np.searchsorted(self._before, index, side='right'))

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, stop, _ = rows.indices(self.shape[0])
    if start >= stop:
      return self._rows[0:0]
    first, last = self.row(start), self.row(stop - 1) + 1
    a, b = np.searchsorted(self._held_out, (first, last))
    found = self._rows[first:last]
    return np.delete(found, self._held_out[a:b] - first, 0) if a < b else found


def choose(
  rows: row_files.Sharded, config: ml_collections.ConfigDict
) -> Chosen:
  """Chooses the rows of the first centers and the held-out rows.

  The rows with the lowest hashes are for the first centers, and the rows with
  the highest are held out. There are more rows than first centers, since some
  may be zero, and with two levels k-means++ chooses among them. The views of an
  image are held out together, as they overlap. No row is held out if fewer rows
  than centers would be left.
  """
  num_rows, num_centers = rows.shape[0], config.cluster.num_centers
  hashes = row_hashes(rows, config.seed)
  held_out = min(num_rows // _HELD_OUT_EVERY, _MAX_HELD_OUT)
  held_out -= held_out % rows.rows_per_image  # Whole images.
  if num_centers > num_rows - held_out:
    held_out = 0
  if held_out and rows.rows_per_image > 1:
    images = hashes.reshape(-1, rows.rows_per_image)
    count = held_out // rows.rows_per_image
    last = np.argpartition(images[:, 0], -count)[-count:]
    images[last] = np.iinfo(np.uint64).max
  wanted = int(_SPARE * num_centers) + _HELD_OUT_EVERY
  if config.cluster.levels:
    wanted = max(wanted, _SAMPLE * config.cluster.levels[0])
  wanted = min(wanted, num_rows - held_out)
  order = np.argpartition(hashes, [wanted - 1, num_rows - held_out - 1])
  first = order[:wanted]
  return Chosen(
    first[np.argsort(hashes[first], kind='stable')],
    np.sort(order[num_rows - held_out :]),
  )


def row_hashes(rows: row_files.Sharded, seed: int) -> np.ndarray:
  """Returns a hash of every row.

  It is the hash of the row's key or, without keys, of the file's name and the
  row's place in the file. Rows of one image have the same key, and their
  numbers are hashed too.

  Args:
    rows: the N rows.
    seed: the seed of the hash.

  Returns:
    The hashes, uint64 [N], uniformly distributed.
  """
  parts = []
  for shard, count in enumerate(rows.shard_rows):
    if rows.has_keys:
      words = _words(rows.shard_keys(shard))
    else:
      name = pathlib.PurePosixPath(rows.paths[shard]).name
      place = np.arange(1, count + 1, dtype=np.uint64)[:, None]
      words = _words(keys_lib.spell([name])).repeat(count, axis=0)
      words = np.concatenate([words, place], axis=1)
    if rows.rows_per_image > 1:
      # From 1 on, as a word of zeros is skipped.
      number = 1 + np.arange(count, dtype=np.uint64)[:, None] % np.uint64(
        rows.rows_per_image
      )
      words = np.concatenate([words, number], axis=1)
    h = np.full(count, seed, np.uint64)
    # A word of zeros is padding. Skipping it makes the hash independent of the
    # longest key of the file.
    for word in words.T:
      h = np.where(word == 0, h, _mix(h ^ word))
    parts.append(_mix(h))
  return np.concatenate(parts)


def _words(keys: np.ndarray) -> np.ndarray:
  """Returns byte strings [n] as uint64 [n, words], padded with zeros."""
  words = -(-keys.dtype.itemsize // 8)
  return keys.astype(f'S{8 * words}').view(np.uint64).reshape(-1, words)


def _mix(h: np.ndarray) -> np.ndarray:
  """Applies the finalizer of splitmix64 (Steele et al., 2014)."""
  h = h + np.uint64(0x9E3779B97F4A7C15)
  h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return h ^ (h >> np.uint64(31))
