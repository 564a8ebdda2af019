"""Clustering takes the same memory however many rows lie on disk."""

import json
import subprocess
import sys

import pytest

from tests import commands

_RUN = (
  'from benchmarks import kmeans_memory; from mlcd_jax.kmeans import chunks; '
  'chunks._CPU_HELD_BYTES = 0; kmeans_memory.main()'
)


def measure(rows):
  out = subprocess.run(
    [sys.executable, '-c', _RUN, f'--rows={rows}', '--dim=512',
     '--centers=64', '--iterations=1'],
    stdout=subprocess.PIPE, check=True, text=True, cwd=commands.ROOT,
  ).stdout  # fmt: skip
  return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
  small, large = measure(100_000), measure(300_000)
  grown = large['data_gib'] - small['data_gib']
  assert grown > 0.19
  assert large['taken_gib'] - small['taken_gib'] < grown / 2
