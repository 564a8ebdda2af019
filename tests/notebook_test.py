"""launch/colab.ipynb runs from top to bottom."""

import os

import nbclient
import nbformat
import pytest

from tests import commands

_SETTINGS = """
WORKDIR = {workdir!r}
SMALLER = '--config.train.steps=60 --config.cluster.num_centers=300'
"""


def outputs(cell, kind):
  return [o for o in cell.get('outputs', ()) if o.output_type == kind]


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
  cache = commands.ROOT / '.cache/jax'
  monkeypatch.setitem(os.environ, 'JAX_COMPILATION_CACHE_DIR', str(cache))
  monkeypatch.setitem(os.environ, 'JAX_NUM_CPU_DEVICES', '1')
  notebook = nbformat.read(commands.ROOT / 'launch/colab.ipynb', as_version=4)
  nbformat.validate(notebook)
  (settings,) = (
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', ())
  )
  assert 'WORKDIR' in settings.source and 'SMALLER' in settings.source
  settings.source = _SETTINGS.format(workdir=str(tmp_path / 'run'))
  nbclient.NotebookClient(
    notebook,
    timeout=900,
    kernel_name='python3',
    resources={'metadata': {'path': str(commands.ROOT)}},
  ).execute()
  pictures = [
    o
    for cell in notebook.cells
    for o in outputs(cell, 'display_data')
    if 'image/png' in o.data
  ]
  assert len(pictures) == 4  # Clusters, several labels, probe, search.
  (said,) = outputs(notebook.cells[-2], 'stream')
  found, chance = (
    int(part.split('%')[0].split()[-1]) for part in said.text.split(';')
  )
  assert found > 4 * chance
  assert (tmp_path / 'run/results.json').exists()


def test_is_committed_without_outputs():
  notebook = nbformat.read(commands.ROOT / 'launch/colab.ipynb', as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None
