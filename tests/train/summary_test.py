"""The table of parameters, and where things lie."""

import re

from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax.train import step
from mlcd_jax.train import summary


def test_parameters_and_what_a_device_holds(tiny_config):
  program = step.Program(
    config=tiny_config,
    num_classes=64,
    steps=10,
    mesh=sharding.make_mesh(4, 2),
  )
  lines = summary.parameters(program).splitlines()
  counts = [
    int(re.search(r'  ([\d,]+)  ', x)[1].replace(',', '')) for x in lines
  ]
  assert sum(counts[:-1]) == counts[-1]
  centers = next(x for x in lines if 'classifier/weight' in x)
  assert 'data' in centers and 'fsdp' in centers
  # Parameters and two moments, each at most whole on every device.
  held = float(re.search(r'([\d.]+) GiB', lines[-1])[1]) * 2**30
  assert 0 < held <= 3 * 4 * counts[-1] + 2**20
  assert '8 cpu, mesh data 4 x fsdp 2, 1 process' == sharding.describe(
    program.mesh
  )


def test_places_are_those_that_are_there(tmp_path):
  (tmp_path / 'report.html').write_text('')
  (tmp_path / 'clusters').mkdir()
  lines = manifests.places(
    tmp_path,
    {'embed': tmp_path / 'embeddings', 'cluster': tmp_path / 'clusters'},
  ).splitlines()
  assert [line.split()[0] for line in lines] == ['cluster', 'page']
