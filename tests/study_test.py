"""A study: its cells, its table, and runs that share clusters."""

import pathlib
import re

import numpy as np
import pytest
import scipy.stats

from benchmarks import paired
from benchmarks import studies
from benchmarks import study_runs
from benchmarks import study_tables
from mlcd_jax import stages
from mlcd_jax.runtime import files
from tests import commands

ROOT = pathlib.Path(__file__).parent.parent

_METRIC = 'trained/digits/knn/accuracy'


def _study(**fields):
  return studies.Study(
    title='Labels',
    config='configs/quickstart.py',
    metrics={_METRIC: 'kNN'},
    **({'settings': {'train.steps': 5}} | fields),
  )


def _record(study_, point, seed, value):
  return {
    'study': 'labels',
    'config': study_.fields(point),
    'seed': seed,
    'results': {_METRIC: value},
  }


def test_every_combination_of_every_seed_is_a_cell():
  made = _study(
    grid={'loss.scale': (8, 16)},
    cells=({}, {'embed.path': '{previous}'}),
    seeds=(1, 2),
  )
  cells = list(study_runs.cells('labels', made))
  assert [(c.seed, c.point) for c in cells[:4]] == [
    (1, {'loss.scale': 8}),
    (1, {'embed.path': '{previous}', 'loss.scale': 8}),
    (1, {'loss.scale': 16}),
    (1, {'embed.path': '{previous}', 'loss.scale': 16}),
  ]
  assert len(cells) == 8
  assert cells[1].previous == cells[0]
  assert cells[4].previous is None


def test_table_has_means_intervals_and_paired_differences(monkeypatch):
  made = _study(
    grid={'loss.num_positives': (1, 8)}, against={'loss.num_positives': 8}
  )
  monkeypatch.setattr(studies, 'STUDIES', {'labels': made})
  scores = {1: (0.80, 0.82, 0.87), 8: (0.90, 0.91, 0.95)}
  records = [
    _record(made, {'loss.num_positives': labels}, seed, value)
    for labels, values in scores.items()
    for seed, value in enumerate(values)
  ]
  _, _, one, eight = study_tables.table('labels', records).splitlines()

  def interval(values, form, to):
    mean = sum(values) / 3
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
    low, high = (form % (mean + sign * half) for sign in (-1, 1))
    return f'{form % mean} ({low}{to}{high})'

  absolute = interval([80, 82, 87], '%.1f', '-')
  difference = interval([-10, -9, -8], '%+.1f', ' to ')
  assert [c.strip() for c in one.split('|')[1:-1]] == [
    'loss.num_positives=1',
    '3',
    f'{absolute}; {difference}',
  ]
  assert eight.split('|')[3].strip() == interval([90, 91, 95], '%.1f', '-')


def test_differences_of_paired_scores_have_a_corrected_p(monkeypatch):
  arms = {f'{n} labels': {'loss.num_positives': n} for n in (1, 4, 8)}
  made = _study(
    cells=list(arms.values()),
    names=arms,
    score='paired',
    against={'loss.num_positives': 1},
  )
  monkeypatch.setattr(studies, 'STUDIES', {'labels': made})
  rng = np.random.default_rng(0)
  records = []
  for fields, mean in zip(arms.values(), (0.5, 0.52, 0.8)):
    for seed, value in enumerate(mean + rng.normal(0, 0.01, 3)):
      without = value + rng.normal(0, 0.001, paired.GROUPS)
      records.append(
        _record(made, fields, seed, value)
        | {'without': {_METRIC: without.tolist()}}
      )
  rows = study_tables.table('labels', records).splitlines()[2:]
  said = [[c.strip() for c in row.split('|')[1:-1]] for row in rows]
  assert [row[0] for row in said] == list(arms)
  assert ';' not in said[0][2]

  def found(n):
    runs = [r for r in records if r['config']['loss.num_positives'] == n]
    return [r['results'][_METRIC] for r in runs], np.array(
      [r['without'][_METRIC] for r in runs]
    )

  few, many = (
    paired.difference(*(x for pair in zip(found(n), found(1)) for x in pair))
    for n in (4, 8)
  )
  # Two differences are shown: the smaller p doubles.
  assert many.p < few.p
  low, high = 100 * (many.mean - many.half), 100 * (many.mean + many.half)
  p = 'p < 0.001' if 2 * many.p < 0.001 else f'p = {2 * many.p:.3f}'
  assert said[2][2].endswith(
    f'; {100 * many.mean:+.1f} ({low:+.1f} to {high:+.1f}), {p}'
  )
  assert said[1][2].endswith(f'p = {max(few.p, 2 * many.p):.3f}')


def test_records_of_other_settings_are_left_out(monkeypatch):
  made = _study(grid={'loss.num_positives': (1,)})
  monkeypatch.setattr(studies, 'STUDIES', {'labels': made})
  longer = _study(
    grid={'loss.num_positives': (1,)}, settings={'train.steps': 9}
  )
  point = {'loss.num_positives': 1}
  records = [_record(made, point, 1, 0.5), _record(longer, point, 2, 0.9)]
  row = study_tables.table('labels', records).splitlines()[-1]
  assert [c.strip() for c in row.split('|')[2:4]] == ['1', '50.0']


def test_documents_say_what_study_json_says():
  records = files.read_json(ROOT / 'docs/study.json')
  found = []
  for name in ('docs/evidence.md', 'README.md'):
    text = (ROOT / name).read_text()
    assert study_tables.fill(text, records) == text
    found += re.findall('<!-- study: (.*) -->', text)
  assert set(found) == {record['study'] for record in records}


@pytest.mark.slow
def test_cells_share_clusters_and_are_run_once(tmp_path, monkeypatch):
  tiny = dict(flag.split('=', 1) for flag in commands.TINY[1:])
  settings = {
    k.removeprefix('--config.'): int(v) if v.isdigit() else v
    for k, v in tiny.items()
  }
  made = _study(
    settings=settings, grid={'loss.num_positives': (1, 2)}, seeds=(1,)
  )
  monkeypatch.setattr(studies, 'STUDIES', {'labels': made})
  runs = study_runs.Runs(tmp_path, data='')
  cells = list(study_runs.cells('labels', made))
  assert all(runs.run(cell) for cell in cells)
  assert len(list(tmp_path.glob('clusters-*/clusters'))) == 1
  found = files.read_json(runs.path)
  assert [r['config']['loss.num_positives'] for r in found] == [1, 2]
  assert all(0 < r['results'][_METRIC] <= 1 for r in found)

  def run(*_):
    raise AssertionError('run again')

  monkeypatch.setattr(stages, 'run', run)
  assert all(runs.run(cell) for cell in cells)
  assert files.read_json(runs.path) == found
