"""Rows on the devices, a chunk at a time, from memory or from disk.

Chunks have one shape, so that programs compile once, and do not depend on
whether the rows are held on the devices or read anew: results have the same
bits. Shapes: N rows, D dimensions, n rows of a chunk.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
from typing import Any
from typing import Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from mlcd_jax import nearest
from mlcd_jax import sharding

# Rows of a chunk: of all CPU devices, which share a memory, and of each
# accelerator.
_CPU_CHUNK = 8_192
_ACCELERATOR_CHUNK = 65_536

# Rows are held on the devices up to this many bytes: of all CPU devices, where
# reading again costs little, and as a share of each accelerator's memory.
_CPU_HELD_BYTES = 2**30
_ACCELERATOR_HELD_SHARE = 0.5


class Rows(Protocol):
  """An array, or files read as one: [N, D] by slices."""

  shape: tuple[int, int]

  def __getitem__(self, rows: slice) -> np.ndarray: ...


class Points:
  """Unit rows in chunks [n, D], float32, sharded as sharding.POINTS.

  Padding, and rows that are zero or not finite, are zero.

  Attributes:
    chunk: n.
  """

  def __init__(self, rows: Rows, mesh: Mesh, *, tile: int, hold: bool):
    """Prepares to read.

    Args:
      rows: [N, D].
      mesh: of all devices.
      tile: what a device's part of a chunk is a multiple of.
      hold: keep the chunks on the devices if they fit.
    """
    self._rows = rows
    self._mesh = mesh
    num_rows, dim = rows.shape
    # As few chunks as can be, of nearly equal size: padding costs time.
    count = max(1, -(-num_rows // chunk_rows(mesh, tile)))
    self.chunk = nearest.up(
      max(1, -(-num_rows // count)), tile * mesh.shape['data']
    )
    padded = nearest.up(num_rows, self.chunk)
    hold = hold and held_bytes(padded, dim, mesh, _memory(mesh)) > 0
    self._held = [] if hold else None

  @property
  def held(self) -> bool:
    """Whether the chunks stay on the devices."""
    return self._held is not None

  def __len__(self) -> int:
    """Number of chunks."""
    return -(-self._rows.shape[0] // self.chunk)

  def __iter__(self) -> Iterator[jax.Array]:
    """Yields the chunks in order; the next is read meanwhile."""
    if self._held:
      yield from self._held
      return
    chunks = []
    with futures.ThreadPoolExecutor(1) as reader:
      following = [reader.submit(self._put, 0)] if len(self) else []
      for i in range(len(self)):
        raw = following.pop().result()
        if i + 1 < len(self):
          following.append(reader.submit(self._put, i + 1))
        unit = _unit(raw)
        if self._held is not None:
          chunks.append(unit)
        yield unit
    if self._held is not None:
      self._held = chunks

  def rows_of(self, i: int) -> tuple[int, int]:
    """First row of chunk i, and the row after its last."""
    return i * self.chunk, min((i + 1) * self.chunk, self._rows.shape[0])

  def put(
    self,
    values: np.ndarray,
    dtype: Any,
    shape: tuple[int, ...] = (),
    padding: float = 0,
  ) -> list[jax.Array]:
    """A value for each row, on the devices in chunks [n, ...] like the rows'.

    Args:
      values: [N, ...]; if there are none, all is padding.
      dtype: of the values.
      shape: of one.
      padding: the value after the last row.
    """
    parts = []
    for start, stop in map(self.rows_of, range(len(self))):
      padded = np.full((self.chunk, *shape), padding, dtype)
      if len(values):
        padded[: stop - start] = values[start:stop]
      parts.append(
        jax.make_array_from_callback(
          padded.shape,
          NamedSharding(self._mesh, sharding.POINTS),
          lambda index, padded=padded: padded[index],
        )
      )
    return parts

  def get(self, parts: Sequence[jax.Array]) -> np.ndarray:
    """What `put` took [N, ...], on the host of every process."""
    whole = np.concatenate([nearest.to_host(part) for part in parts])
    return whole[: self._rows.shape[0]]

  def at(self, parts: Sequence[jax.Array], rows: np.ndarray) -> np.ndarray:
    """What `put` took of some rows, in ascending order; without copying all."""
    found = []
    for i, part in enumerate(parts):
      start, stop = self.rows_of(i)
      here = rows[(start <= rows) & (rows < stop)]
      found.append(nearest.to_host(part)[here - start])
    return np.concatenate(found)

  def bad_rows(self, i: int) -> list[int]:
    """Rows of chunk i that are zero or not finite."""
    start, stop = self.rows_of(i)
    rows = np.asarray(self._rows[start:stop], np.float32)
    return (start + np.flatnonzero(~unit_rows(rows).any(axis=1))).tolist()

  def _put(self, i: int) -> jax.Array:
    """Chunk i as it is stored, padded with zero rows."""
    start, stop = self.rows_of(i)
    shape = (self.chunk, self._rows.shape[1])
    parts = {}  # Devices with the same rows share one reading of them.

    def read(index):
      first, last, _ = index[0].indices(self.chunk)
      if first not in parts:
        parts[first] = self._read(start + first, start + last, stop)
      return parts[first]

    return jax.make_array_from_callback(
      shape, NamedSharding(self._mesh, sharding.POINTS), read
    )

  def _read(self, first: int, last: int, stop: int) -> np.ndarray:
    """Rows as they are stored; zero from `stop` on."""
    rows = np.asarray(self._rows[first : max(first, min(last, stop))])
    if rows.dtype != np.float16:
      rows = rows.astype(np.float32, copy=False)
    if len(rows) == last - first:
      return rows
    shape = (last - first - len(rows), rows.shape[1])
    return np.concatenate([rows, np.zeros(shape, rows.dtype)])


def unit_rows(rows: np.ndarray) -> np.ndarray:
  """float32 unit rows; what is not finite or zero becomes zero."""
  rows = np.asarray(rows, np.float32)
  norm = np.sqrt(np.square(rows).sum(-1, keepdims=True))
  usable = np.isfinite(norm) & (norm > 0)
  return np.where(usable, rows / np.where(usable, norm, 1), 0)


def unit_rows_at(rows: Rows, places: np.ndarray) -> np.ndarray:
  """`unit_rows` of the rows at these places."""
  return unit_rows(np.concatenate([rows[i : i + 1] for i in places.tolist()]))


@jax.jit
def _unit(x_nD: jax.Array) -> jax.Array:
  """`unit_rows` on the devices."""
  x_nD = x_nD.astype(jnp.float32)
  square_n1 = jnp.sum(jnp.square(x_nD), axis=1, keepdims=True)
  usable_n1 = jnp.isfinite(square_n1) & (square_n1 > 0)
  scale_n1 = lax.rsqrt(jnp.where(usable_n1, square_n1, 1))
  return jnp.where(usable_n1, x_nD * scale_n1, 0)


def chunk_rows(mesh: Mesh, tile: int) -> int:
  """Rows of a chunk, where there are that many."""
  shards = mesh.shape['data']
  if nearest.on_cpu(mesh):
    return shards * nearest.up(max(1, _CPU_CHUNK // shards), tile)
  return shards * nearest.up(_ACCELERATOR_CHUNK, tile)


def held_bytes(num_rows: int, dim: int, mesh: Mesh, memory: float) -> float:
  """Bytes of rows that each device holds; 0 where they are read anew.

  Args:
    num_rows: N.
    dim: D.
    mesh: of all devices.
    memory: bytes of a device; CPUs' is not asked for.
  """
  held = 4 * num_rows * dim / mesh.shape['data']
  if nearest.on_cpu(mesh):
    return held if held * mesh.size <= _CPU_HELD_BYTES else 0
  return held if held <= _ACCELERATOR_HELD_SHARE * memory else 0


def _memory(mesh: Mesh) -> float:
  """Bytes of a device, where it says so."""
  return (mesh.local_devices[0].memory_stats() or {}).get('bytes_limit', 0)
