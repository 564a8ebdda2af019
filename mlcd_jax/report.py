"""Prints the results of one or more runs as a table.

python -m mlcd_jax.report runs/scenes runs/scenes_one
"""

from collections.abc import Sequence
import pathlib

from mlcd_jax.evaluate import table as evaluate_table
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths

_HEADINGS = {
  'linear': 'linear probe',
  'knn': 'kNN (k = 10)',
  'few_shot': 'few-shot (20 a class)',
  'multi_label': 'multi-label mAP',
}
# The shown metric of the tasks that do not score accuracy.
_METRICS = {'multi_label': 'mAP'}
# What a row says of the rule; the others are by the nearest centers.
_RULES = {'views': ', of its crops', 'pursuit': ', by pursuit'}


def table(workdirs: Sequence[pathlib.Path]) -> str:
  """Returns a table of scores in percent with their 95% intervals.

  Only the baselines of the first run are shown, since runs on the same data
  have the same baselines.

  Args:
    workdirs: the workdirs of runs whose evaluation is done.

  Raises:
    UserError: a workdir has no results.
  """
  rows = []
  for i, workdir in enumerate(workdirs):
    path = pathlib.Path(workdir) / 'results.json'
    if not path.exists():
      raise errors.UserError(f'{path}: no results; run the evaluate stage')
    results = files.read_json(path)
    config = files.read_json(path.with_name('config.json'))
    datasets = list(dict.fromkeys(k.split('/')[1] for k in results))
    found = {k.split('/')[0] for k in results}
    for encoder, shown in evaluate_table.ENCODERS.items():
      if encoder not in found:
        continue
      if i and encoder != 'trained':
        continue
      if encoder == 'trained':
        labels = config['loss']['num_positives']
        shown = f'{shown}, {labels} label{"s" * (labels > 1)} an image'
        shown += _RULES.get(config['cluster'].get('rule'), '')
        shown = config['evaluate'].get('encoder') or shown
      for dataset in datasets:
        rows.append(
          (
            i,
            shown,
            dataset,
            {t: _cell(results, f'{encoder}/{dataset}', t) for t in _HEADINGS},
          )
        )
  # Trained encoders stand above the baselines.
  rows.sort(key=lambda row: row[1] in evaluate_table.ENCODERS.values())
  tasks = [t for t in _HEADINGS if any(row[3][t] for row in rows)]
  lines = [('features', 'data', *(_HEADINGS[t] for t in tasks))]
  lines += [
    (shown, dataset, *(cells[t] or '' for t in tasks))
    for _, shown, dataset, cells in rows
  ]
  return evaluate_table.align(lines)


def _cell(results: dict[str, float], prefix: str, task: str) -> str:
  """Returns a score as '93.3 (92.0-94.5)'; '' if the task was not run."""
  name = f'{prefix}/{task}/{_METRICS.get(task, "accuracy")}'
  value = results.get(name)
  if value is None:
    return ''
  low, high = (results[f'{name}_{end}'] for end in ('low', 'high'))
  return f'{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})'


def main(workdirs: Sequence[str]) -> None:
  """Prints the table of the given workdirs."""
  if not workdirs:
    known = sorted(pathlib.Path('runs').glob('*/results.json'))
    there = ', '.join(str(path.parent) for path in known)
    raise errors.UserError(
      'name one or more workdirs' + f'; there are {there}' * bool(known)
    )
  print(table([paths.local(w) for w in workdirs]))


if __name__ == '__main__':
  cli.run(main, required=())
