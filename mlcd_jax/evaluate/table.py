"""results.json as a table in the terminal, one line a metric."""

from collections.abc import Mapping
from collections.abc import Sequence

from mlcd_jax import config as config_lib

_HEADINGS = ('features', 'data', 'task', 'metric', 'value', '95 %', 'count')
# What results.json calls an encoder, and how tables show it, in their order.
ENCODERS = {
  'trained': 'trained encoder',
  'embedder': 'embedder (its teacher)',
  'random': 'random encoder',
  'raw': 'raw pixels',
}
_PARTS = ('_low', '_high', '_count')
# What a probe says of its fit, which is no metric.
OF_FITS = ('penalty', 'objective', 'iterations', 'converged')


def table(results: Mapping[str, float | None]) -> str:
  """Returns every metric with its interval and count.

  Args:
    results: '<encoder>/<data set>/<task>/<metric>' -> value, as results.json.

  Returns:
    Lines by data set, task and metric, the encoders beside each other.
  """
  rows = []
  for name, value in results.items():
    encoder, dataset, task, metric = name.split('/')
    if name.endswith(_PARTS) or metric in OF_FITS:
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
  encoder, dataset, task, metric, *_ = row
  return (
    dataset,
    config_lib.TASKS.index(task),
    metric,
    list(ENCODERS).index(encoder),
  )


def align(lines: Sequence[Sequence[str]]) -> str:
  """A Markdown table with padded columns."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  rows = [
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(line, widths)) + ' |'
    for line in lines
  ]
  rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
  return '\n'.join([rows[0], rule, *rows[1:]])
