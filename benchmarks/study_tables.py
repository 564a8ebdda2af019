"""Tables and plots of study.json, with 95 % intervals over seeds.

  python benchmarks/study_tables.py docs/study.json --plots=docs/evidence \
    docs/evidence.md README.md

writes a plot of every study with a grid into the folder, and the table of a
study into the documents wherever they say `<!-- study: NAME -->`. An interval
is Student's over the seeds; a difference is that of the same seed's runs. Where
a study is scored as 'paired', the interval of a difference is of the test
images too, and p is corrected for the number of differences in the table
(paired.py).
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import matplotlib

matplotlib.use('agg')

# ruff: noqa: E402
from matplotlib import pyplot as plt
import numpy as np

from benchmarks import paired
from benchmarks import studies
from mlcd_jax.evaluate import intervals
from mlcd_jax.evaluate import table as evaluate_table
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files

_NAMES = {
  'trained': 'trained encoder',
  'embedder': 'embedder',
  'random': 'random encoder',
  'raw': 'raw pixels',
  'hog': 'histograms of oriented gradients',
}

Records = Sequence[Mapping[str, Any]]


def write(records: Records, folder: pathlib.Path) -> None:
  """Writes tables.md and the plots.

  Args:
    records: of study.json.
    folder: made where it is not there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  text = '\n'.join(
    f'## {name}\n\n{table(name, chosen)}'
    for name, chosen in _by_study(records).items()
  )
  with files.atomic(folder / 'tables.md') as temporary:
    temporary.write_text(text)
  plot(records, folder)


def fill(text: str, records: Records) -> str:
  """A document with its tables made anew.

  Args:
    text: Markdown; a table follows a line `<!-- study: NAME -->`.
    records: of study.json.

  Raises:
    UserError: a study without records.
  """
  found = _by_study(records)

  def made(match):
    if match[2] not in found:
      raise errors.UserError(
        f'there is no study {match[2]!r}; there are: ' + ', '.join(found)
      )
    return match[1] + table(match[2], found[match[2]])

  return re.sub(r'(<!-- study: (\w+) -->\n\n)(?:\|.*\n)*', made, text)


def _by_study(records: Records) -> dict[str, Records]:
  found = {
    name: [r for r in records if r['study'] == name] for name in studies.STUDIES
  }
  return {name: chosen for name, chosen in found.items() if chosen}


def table(name: str, records: Records) -> str:
  """A study's means in percent, intervals, and differences, as Markdown.

  Args:
    name: of the study.
    records: its own.
  """
  study = studies.STUDIES[name]
  rows = [(study.title, 'seeds', *study.metrics.values())]
  against = {}
  if study.against is not None:
    against = _by_seed(records, study, study.against)
  tested = _tested(study, records)
  for point in study.points():
    runs = _by_seed(records, study, point)
    for encoder in _NAMES if study.baselines else ('trained',):
      cells = []
      for metric in study.metrics:
        metric = metric.replace('trained', encoder, 1)
        found = tested.get((study.say(point), metric))
        cells.append(_cell(runs, against, metric) if not found else found)
      if any(cells):
        said = _NAMES[encoder] if study.baselines else study.say(point)
        rows.append((said, str(len(runs)), *cells))
  return evaluate_table.align(rows) + '\n'


def _cell(runs, against, metric: str) -> str:
  """'87.1 (86.2-88.0)', and the difference to the same seeds of another."""
  values = {
    s: 100 * r['results'][metric]
    for s, r in runs.items()
    if metric in r['results']
  }
  if not values:
    return ''
  shown = _interval(list(values.values()), '{:.1f}', '-')
  differences = [
    value - 100 * against[seed]['results'][metric]
    for seed, value in values.items()
    if seed in against and against[seed] is not runs[seed]
  ]
  if differences:
    shown += '; ' + _interval(differences, '{:+.1f}', ' to ')
  return shown


def _tested(
  study: studies.Study, records: Records
) -> dict[tuple[str, str], str]:
  """Returns the cells whose differences have a p, by row and metric."""
  if study.score != 'paired' or study.against is None:
    return {}
  against = _by_seed(records, study, study.against)
  shown, differences = {}, {}
  for point in study.points():
    runs = _by_seed(records, study, point)
    seeds = sorted(set(runs) & set(against))
    if len(seeds) < 2 or runs[seeds[0]] is against[seeds[0]]:
      continue
    for metric in study.metrics:
      key = study.say(point), metric
      shown[key] = _cell(runs, {}, metric)
      differences[key] = paired.difference(
        *(
          [side[seed][what][metric] for seed in seeds]
          for what in ('results', 'without')
          for side in (runs, against)
        )
      )
  corrected = paired.holm([d.p for d in differences.values()])
  for (key, d), p in zip(differences.items(), corrected):
    low, high = 100 * (d.mean - d.half), 100 * (d.mean + d.half)
    said = 'p < 0.001' if p < 0.001 else f'p = {p:.3f}'
    shown[key] += f'; {100 * d.mean:+.1f} ({low:+.1f} to {high:+.1f}), {said}'
  return shown


def _interval(values: Sequence[float], form: str, to: str) -> str:
  if len(values) == 1:
    return form.format(values[0])
  found = intervals.over_draws(np.asarray(values))
  low, high = (form.format(found[k]) for k in ('_low', '_high'))
  return f'{form.format(found[""])} ({low}{to}{high})'


def _by_seed(
  records: Records, study: studies.Study, point: Mapping[str, Any]
) -> dict[int, Mapping[str, Any]]:
  """The records of a cell, by seed."""
  config = study.fields(point)
  return {r['seed']: r for r in records if r['config'] == config}


def plot(records: Records, folder: pathlib.Path) -> None:
  """Writes a plot of every study with a grid.

  Args:
    records: of study.json.
    folder: that they are written to.
  """
  for name, chosen in _by_study(records).items():
    if studies.STUDIES[name].grid:
      _plot(name, chosen, folder / f'{name}.png')


def _plot(name: str, records: Records, path: pathlib.Path) -> None:
  """Every metric over the first field of the grid, a line for the others."""
  study = studies.STUDIES[name]
  field, *_ = study.grid
  values = study.grid[field]
  others = []
  for point in study.points():
    rest = {k: v for k, v in point.items() if k != field}
    others += [rest] * (rest not in others)
  figure, axes = plt.subplots(
    1, len(study.metrics), figsize=(4 * len(study.metrics), 3.2), squeeze=False
  )
  for ax, (metric, heading) in zip(axes[0], study.metrics.items()):
    for rest in others:
      points = []
      for value in values:
        runs = _by_seed(records, study, {**rest, field: value})
        found = [r['results'] for r in runs.values()]
        scores = [100 * r[metric] for r in found if metric in r]
        if scores:
          points.append((value, *_mean_and_half(scores)))
      if points:
        x, y, half = zip(*points)
        ax.errorbar(
          x, y, yerr=half, marker='o', capsize=3, label=study.say(rest)
        )
    if min(values) > 0 and max(values) >= 10 * min(values):
      ax.set_xscale('log')
      ax.set_xticks(values, [f'{v:g}' for v in values])
      ax.minorticks_off()
    ax.set_xlabel(field)
    ax.set_title(f'{heading}, %')
    ax.grid(alpha=0.3)
  if len(others) > 1:
    axes[0][-1].legend(fontsize='small')
  figure.tight_layout()
  with files.atomic(path) as temporary:
    figure.savefig(temporary, format='png', dpi=80)
  plt.close(figure)


def _mean_and_half(scores: Sequence[float]) -> tuple[float, float]:
  """The mean and half of its interval, 0 for a single score."""
  if len(scores) == 1:
    return scores[0], 0.0
  found = intervals.over_draws(np.asarray(scores))
  return found[''], found['_high'] - found['']


def main() -> None:
  """Writes plots, and tables into documents."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('study', type=pathlib.Path)
  parser.add_argument('documents', type=pathlib.Path, nargs='*')
  parser.add_argument('--plots', type=pathlib.Path)
  args = parser.parse_intermixed_args()
  for path in (args.study, *args.documents):
    if not path.is_file():
      parser.error(f'{path}: no such file')
  try:
    records = files.read_json(args.study)
    for path in args.documents:
      path.write_text(fill(path.read_text(), records))
  except errors.UserError as error:
    parser.error(str(error))
  if args.plots:
    args.plots.mkdir(parents=True, exist_ok=True)
    plot(records, args.plots)


if __name__ == '__main__':
  main()
