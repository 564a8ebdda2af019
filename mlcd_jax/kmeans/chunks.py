"""Rows on the devices, a chunk at a time, from memory or from disk.

All chunks have one shape, so that programs compile once. The shape does not
depend on whether the rows are held on the devices or read anew in every pass,
so that both give the same bits.

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

# Rows of a chunk of all CPU devices together, which share a memory. A chunk of
# 768 dimensions takes 24 MiB, and each core searches one.
_CPU_CHUNK = 8_192

# Rows of a chunk of each accelerator: 192 MiB with 768 dimensions. Not tuned.
_ACCELERATOR_CHUNK = 65_536

# Rows are held on CPU devices up to this many bytes in all. Reading them again
# costs little beside the products.
_CPU_HELD_BYTES = 2**30

# Share of an accelerator's memory up to which rows are held. The other half is
# for centers, sums and scores.
_ACCELERATOR_HELD_SHARE = 0.5

# Rows of the sample: their mean is that of all rows to about 1 / 45 of the
# deviation.
_SAMPLE_ROWS = 2_048

_unit = jax.jit(unit.unit_rows_jax)


class Sample(NamedTuple):
  """A few rows on the host, at equal distances among all.

  Attributes:
    indices: their numbers [S], ascending.
    rows: float32 [S, D] unit rows.
    mean: float32 [D], their mean to three digits.
  """

  indices: np.ndarray
  rows: np.ndarray
  mean: np.ndarray


class Chunks:
  """Unit rows in chunks [n, D], float32, sharded as sharding.POINTS.

  Padding rows are zero, and so are rows that are zero or not finite.

  Attributes:
    rows: the rows [N, D] that are read.
    mesh: of all devices.
    chunk: n.
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
    """Prepares to read.

    Args:
      rows: [N, D].
      mesh: of all devices.
      tile: each device's part of a chunk is a multiple of it.
      hold: whether the chunks stay on the devices if they fit.
      chunk: the most rows of a chunk; `chunk_rows` where not given.
    """
    self.rows = rows
    self.mesh = mesh
    num_rows, dim = rows.shape
    # As few chunks as can be, of nearly equal size: padding costs time.
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
    """Yields the chunks in order, and reads the next one meanwhile."""
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
    if self._held is not None:
      self._held = held

  def rows_of(self, i: int) -> tuple[int, int]:
    """Returns the first row of chunk i, and the row after its last."""
    return i * self.chunk, min((i + 1) * self.chunk, self.rows.shape[0])

  def put(
    self,
    values: np.ndarray,
    dtype: Any,
    shape: tuple[int, ...] = (),
    padding: float = 0,
  ) -> list[jax.Array]:
    """Puts a value for each row onto the devices, in chunks [n, ...].

    Args:
      values: [N, ...]; where it is empty, every value is padding.
      dtype: of the values.
      shape: of one value.
      padding: the values after the last row.
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
    """Fetches what `put` put, [N, ...], onto the host of every process."""
    whole = np.concatenate([sharding.to_host(part) for part in parts])
    return whole[: self.rows.shape[0]]

  def at(self, parts: Sequence[jax.Array], indices: np.ndarray) -> np.ndarray:
    """Fetches what `put` put of some rows, whose numbers ascend."""
    values = []
    for i, part in enumerate(parts):
      start, stop = self.rows_of(i)
      here = indices[(start <= indices) & (indices < stop)]
      values.append(sharding.to_host(part)[here - start])
    return np.concatenate(values)

  def bad_rows(self, i: int) -> list[int]:
    """Returns the numbers of chunk i's rows that are zero or not finite."""
    start, stop = self.rows_of(i)
    rows = np.asarray(self.rows[start:stop], np.float32)
    return (start + np.flatnonzero(~unit.unit_rows(rows).any(axis=1))).tolist()

  def sample(self) -> Sample:
    """Reads the sample."""
    count = min(_SAMPLE_ROWS, self.rows.shape[0])
    indices = np.linspace(0, self.rows.shape[0] - 1, count).astype(int)
    rows = unit.unit_rows_at(self.rows, indices)
    usable = max(1, rows.any(axis=1).sum())
    # Rounded, so that the mean does not depend on the order of a sum.
    return Sample(indices, rows, np.round(rows.sum(axis=0) / usable, 3))

  def _put(self, i: int) -> jax.Array:
    """Puts chunk i as it is stored, padded with zero rows."""
    start, stop = self.rows_of(i)
    shape = (self.chunk, self.rows.shape[1])
    parts = {}  # Devices with the same rows share one reading of them.

    def read(index):
      first, last, _ = index[0].indices(self.chunk)
      if first not in parts:
        parts[first] = self._read(start + first, start + last, stop)
      return parts[first]

    return jax.make_array_from_callback(
      shape, NamedSharding(self.mesh, sharding.POINTS), read
    )

  def _read(self, first: int, last: int, stop: int) -> np.ndarray:
    """Reads rows as they are stored; from `stop` on they are zero."""
    rows = np.asarray(self.rows[first : max(first, min(last, stop))])
    if rows.dtype != np.float16:
      rows = rows.astype(np.float32, copy=False)
    if len(rows) == last - first:
      return rows
    shape = (last - first - len(rows), rows.shape[1])
    return np.concatenate([rows, np.zeros(shape, rows.dtype)])


def chunk_rows(mesh: Mesh, tile: int) -> int:
  """Returns the most rows of a chunk."""
  shards = mesh.shape['data']
  if sharding.on_cpu(mesh):
    return shards * tiles.round_up(max(1, _CPU_CHUNK // shards), tile)
  return shards * tiles.round_up(_ACCELERATOR_CHUNK, tile)


def held_bytes(num_rows: int, dim: int, mesh: Mesh, memory: float) -> float:
  """Returns the bytes of rows that each device holds.

  Args:
    num_rows: N.
    dim: D.
    mesh: of all devices.
    memory: bytes of a device; not used for CPUs.

  Returns:
    The bytes, or 0 where the rows do not fit and are read anew in every pass.
  """
  held = 4 * num_rows * dim / mesh.shape['data']
  if sharding.on_cpu(mesh):
    return held if held * mesh.size <= _CPU_HELD_BYTES else 0
  return held if held <= _ACCELERATOR_HELD_SHARE * memory else 0


def _memory(mesh: Mesh) -> float:
  """Returns the bytes of a device, or 0 where it does not say."""
  return (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit', 0)
