"""The table of results.json in the terminal, with one line per metric."""

from collections.abc import Mapping
from collections.abc import Sequence

from mlcd_jax import config as config_lib

_HEADINGS = ('features', 'data', 'task', 'metric', 'value', '95 %', 'count')
# The names of encoders in results.json and in tables, in the order of tables.
ENCODERS = {
  'trained': 'trained encoder',
  'embedder': 'embedder (its teacher)',
  'random': 'random encoder',
  'raw': 'raw pixels',
}
_PARTS = ('_low', '_high', '_count')
# The values in results.json that describe the fit of a probe; tables omit them.
OF_FITS = ('penalty', 'objective', 'iterations', 'converged')
# The recall of objects by size and number. Only results.json and the page have
# it; its seven lines an encoder would hide the others.
_OF_OBJECTS = 'recall_'


def table(results: Mapping[str, float | None]) -> str:
  """Returns a Markdown table of every metric with its interval and count.

  Args:
    results: the content of results.json: values by
      '<encoder>/<data set>/<task>/<metric>', None if undefined.

  Returns:
    The table. Its lines are in the order of data set, task and metric, so that
    the encoders follow each other.
  """
  rows = []
  for name, value in results.items():
    encoder, dataset, task, metric = name.split('/')
    if name.endswith(_PARTS) or metric in OF_FITS:
      continue
    if metric.startswith(_OF_OBJECTS):
      continue
    low, high, count = (results.get(name + end) for end in _PARTS)
    interval = '' if low is None else f'{low:.4f} to {high:.4f}'
    rows.append(
      (
        encoder,
        dataset,
        task,
        metric,
        'undefined' if value is None else f'{value:.4f}',
        interval,
        '' if count is None else f'{count:.0f}',
      )
    )
  rows.sort(key=_order)
  return align([_HEADINGS, *rows])


def _order(row: Sequence[str]) -> tuple:
  """Returns the sort key of a line."""
  encoder, dataset, task, metric, *_ = row
  return (
    dataset,
    config_lib.TASKS.index(task),
    metric,
    list(ENCODERS).index(encoder),
  )


def align(lines: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table with padded columns; `lines` begins with heads."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  rows = [
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(line, widths)) + ' |'
    for line in lines
  ]
  rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
  return '\n'.join([rows[0], rule, *rows[1:]])
