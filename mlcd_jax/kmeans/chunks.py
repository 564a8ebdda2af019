"""The transfer of rows to the devices, in chunks, from memory or from disk.

All chunks have the same shape, so each program compiles once. The shape is the
same whether the devices hold the rows or read them anew in every pass, so both
ways give the same bits.

A bad row is a row that is zero or not finite. It becomes a row of zeros.

Shapes: N rows, D dimensions, n rows of a chunk, S sampled rows.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans import tiles

# The most rows of a chunk on CPUs, for all devices together, since they share
# one memory. With 768 dimensions a chunk takes 24 MiB, and `fast/` searches one
# chunk on each core.
_CPU_CHUNK = 8_192

# The most rows that one accelerator has of a chunk. With 768 dimensions they
# take 192 MiB. Not tuned.
_ACCELERATOR_CHUNK = 65_536

# CPU devices hold the rows if they take at most this many bytes in all. Larger
# arrays are read again in every pass, which costs little beside the products.
_CPU_HELD_BYTES = 2**30

# An accelerator holds its rows if they take at most this share of its memory.
# The other half is for centers, sums and scores.
_ACCELERATOR_HELD_SHARE = 0.5

# Rows of the sample. Its mean differs from the mean of all rows by about 1 / 45
# of the standard deviation, since 45 is the root of 2,048.
_SAMPLE_ROWS = 2_048

_unit = jax.jit(unit.unit_rows_jax)


class Sample(NamedTuple):
  """A sample of the rows, evenly spaced among all of them, on the host.

  Attributes:
    indices: the row numbers of the sample [S], ascending.
    rows: the sampled rows as unit rows, float32 [S, D].
    mean: the mean of the sampled rows that are not bad, float32 [D], rounded to
      three decimals.
  """

  indices: np.ndarray
  rows: np.ndarray
  mean: np.ndarray


class Chunks:
  """All rows as unit rows, in chunks [n, D], float32.

  A chunk is sharded as sharding.POINTS. The last chunk is padded with zero
  rows.

  Attributes:
    rows: the rows [N, D] as they are stored.
    mesh: the mesh of all devices.
    chunk: n, the number of rows of a chunk on all devices together.
  """

  def __init__(
    self,
    rows: unit.Rows,
    mesh: Mesh,
    *,
    tile: int,
    hold: bool,
    chunk: int | None = None,
  ):
    """Chooses the size of a chunk; reads nothing yet.

    Args:
      rows: the rows [N, D] as they are stored.
      mesh: the mesh of all devices.
      tile: the number of rows of a score tile. The rows that a device has of a
        chunk are a multiple of it.
      hold: whether the chunks stay on the devices after the first pass, if they
        fit.
      chunk: the most rows of a chunk; the result of `chunk_rows` by default.
    """
    self.rows = rows
    self.mesh = mesh
    num_rows, dim = rows.shape
    # As few chunks as possible, all of nearly the same size: a last chunk that
    # is mostly padding would take as long as a full one.
    count = max(1, -(-num_rows // (chunk or chunk_rows(mesh, tile))))
    self.chunk = tiles.round_up(
      max(1, -(-num_rows // count)), tile * mesh.shape['data']
    )
    padded = tiles.round_up(num_rows, self.chunk)
    hold = hold and held_bytes(padded, dim, mesh, _memory(mesh)) > 0
    self._held = [] if hold else None

  def __len__(self) -> int:
    """Returns the number of chunks."""
    return -(-self.rows.shape[0] // self.chunk)

  def __iter__(self) -> Iterator[jax.Array]:
    """Yields the chunks in order.

    While the caller works on a chunk, a thread reads the next one.
    """
    if self._held:
      yield from self._held
      return
    held = []
    with futures.ThreadPoolExecutor(1) as reader:
      following = [reader.submit(self._put, 0)] if len(self) else []
      for i in range(len(self)):
        raw = following.pop().result()
        if i + 1 < len(self):
          following.append(reader.submit(self._put, i + 1))
        x_nD = _unit(raw)
        if self._held is not None:
          held.append(x_nD)
        yield x_nD
    # Only a pass that reached its end has all chunks.
    if self._held is not None:
      self._held = held

  def rows_of(self, i: int) -> tuple[int, int]:
    """Returns where chunk i starts and stops among all rows, like a slice.

    Padding rows do not count.
    """
    return i * self.chunk, min((i + 1) * self.chunk, self.rows.shape[0])

  def put(
    self,
    values: np.ndarray,
    dtype: Any,
    shape: tuple[int, ...] = (),
    padding: float = 0,
  ) -> list[jax.Array]:
    """Puts one value per row onto the devices, in chunks like the rows.

    Args:
      values: the values [N, ...]; if it is empty, every value is `padding`.
      dtype: the type of the values.
      shape: the shape of the value of one row.
      padding: the value of padding rows.

    Returns:
      An array [n, ...] for each chunk.
    """
    parts = []
    for start, stop in map(self.rows_of, range(len(self))):
      padded = np.full((self.chunk, *shape), padding, dtype)
      if len(values):
        padded[: stop - start] = values[start:stop]
      parts.append(
        jax.make_array_from_callback(
          padded.shape,
          NamedSharding(self.mesh, sharding.POINTS),
          lambda index, padded=padded: padded[index],
        )
      )
    return parts

  def get(self, parts: Sequence[jax.Array]) -> np.ndarray:
    """Copies the values of all rows to every host: the inverse of `put`.

    Args:
      parts: an array [n, ...] for each chunk.

    Returns:
      The values [N, ...] without those of padding rows.
    """
    whole = np.concatenate([sharding.to_host(part) for part in parts])
    return whole[: self.rows.shape[0]]

  def at(self, parts: Sequence[jax.Array], indices: np.ndarray) -> np.ndarray:
    """Copies the values of some rows to every host.

    Args:
      parts: an array [n, ...] for each chunk.
      indices: the row numbers [S], ascending.

    Returns:
      The values [S, ...].
    """
    values = []
    for i, part in enumerate(parts):
      start, stop = self.rows_of(i)
      here = indices[(start <= indices) & (indices < stop)]
      values.append(sharding.to_host(part)[here - start])
    return np.concatenate(values)

  def bad_rows(self, i: int) -> list[int]:
    """Returns the row numbers of chunk i's bad rows."""
    start, stop = self.rows_of(i)
    rows = np.asarray(self.rows[start:stop], np.float32)
    return (start + np.flatnonzero(~unit.unit_rows(rows).any(axis=1))).tolist()

  def sample(self) -> Sample:
    """Reads the sample from memory or disk."""
    count = min(_SAMPLE_ROWS, self.rows.shape[0])
    indices = np.linspace(0, self.rows.shape[0] - 1, count).astype(int)
    rows = unit.unit_rows_at(self.rows, indices)
    usable = max(1, rows.any(axis=1).sum())
    # Sums in another order differ in their last bits; rounding removes that.
    return Sample(indices, rows, np.round(rows.sum(axis=0) / usable, 3))

  def _put(self, i: int) -> jax.Array:
    """Puts chunk i onto the devices as it is stored, padded with zero rows."""
    start, stop = self.rows_of(i)
    shape = (self.chunk, self.rows.shape[1])
    parts = {}  # Devices with the same rows share one read of them.

    def read(index):
      first, last, _ = index[0].indices(self.chunk)
      if first not in parts:
        parts[first] = self._read(start + first, start + last, stop)
      return parts[first]

    return jax.make_array_from_callback(
      shape, NamedSharding(self.mesh, sharding.POINTS), read
    )

  def _read(self, first: int, last: int, stop: int) -> np.ndarray:
    """Reads rows `first` to `last` as they are stored.

    Rows from `stop` on are padding: they are zero.

    Returns:
      Rows [last - first, D], float16 if they are stored as such, else float32.
    """
    rows = np.asarray(self.rows[first : max(first, min(last, stop))])
    # float16 halves the transfer; the devices convert it.
    if rows.dtype != np.float16:
      rows = rows.astype(np.float32, copy=False)
    if len(rows) == last - first:
      return rows
    shape = (last - first - len(rows), rows.shape[1])
    return np.concatenate([rows, np.zeros(shape, rows.dtype)])


def chunk_rows(mesh: Mesh, tile: int) -> int:
  """Returns how many rows a chunk has at most, on all devices together.

  Args:
    mesh: the mesh of all devices.
    tile: the number of rows of a score tile. Each device's rows are a multiple.
  """
  shards = mesh.shape['data']
  if sharding.on_cpu(mesh):
    return shards * tiles.round_up(max(1, _CPU_CHUNK // shards), tile)
  return shards * tiles.round_up(_ACCELERATOR_CHUNK, tile)


def held_bytes(num_rows: int, dim: int, mesh: Mesh, memory: float) -> float:
  """Returns how many bytes of rows each device holds between passes.

  Args:
    num_rows: N.
    dim: D.
    mesh: the mesh of all devices.
    memory: the memory of a device in bytes; not used for CPUs.

  Returns:
    The bytes, or 0 if the rows do not fit and are read anew in every pass.
  """
  held = 4 * num_rows * dim / mesh.shape['data']
  # The CPU devices share one memory, so what they hold is added up.
  if sharding.on_cpu(mesh):
    return held if held * mesh.size <= _CPU_HELD_BYTES else 0
  return held if held <= _ACCELERATOR_HELD_SHARE * memory else 0


def _memory(mesh: Mesh) -> float:
  """Returns the memory of a device in bytes, or 0 if it does not tell."""
  return (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit', 0)
