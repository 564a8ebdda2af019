"""Writes the tables of label_rules.py into a document.

  python benchmarks/label_tables.py docs/label_rules.json docs/labels.md

A table replaces what follows a line `<!-- labels: NAME -->`. A value is the
mean of the seeds and their standard deviation.
"""

import argparse
from collections.abc import Mapping
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

# ruff: noqa: E402
import numpy as np

from mlcd_jax.evaluate import table
from mlcd_jax.runtime import files

_LABELS = (1, 2, 4, 8, 16)


def _means(of_seeds: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
  """Returns 'mean ± standard deviation' over the seeds, by name."""
  out = {}
  for name in next(iter(of_seeds.values())):
    values = [found[name] for found in of_seeds.values()]
    out[name] = f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'
  return out


def tables(records: Mapping[str, Mapping]) -> dict[str, str]:
  """Returns the tables as Markdown, by name, of what was measured."""
  makers = {
    'named': (_named, 'parts'),
    'presence': (_presence, 'presence'),
    'free': (_free, 'free'),
  }
  return {
    name: table.align(rows(_means(records[part]))) + '\n'
    for name, (rows, part) in makers.items()
    if part in records
  }


def _named(parts):
  """Returns the rows of the table of centers of single digits."""
  rows = [('rule', 'labels', 'digits named', 'labels right', 'presence mAP')]
  for rule, count in (
    ('nearest', 4), ('nearest', 8), ('pursuit', 4), ('pursuit', 8),
    ('random_members', 4), ('random_members', 8), ('views', 4),
  ):  # fmt: skip
    rows.append(
      (
        rule.replace('_', ' '),
        str(count),
        parts[f'{rule} {count} named'],
        parts[f'{rule} {count} right'],
        parts[f'mean K=300 crops {rule} {count}'],
      )
    )
  return rows


def _presence(presence):
  """Returns the rows of the table of centers of whole scenes."""
  rows = [('centers', 'rule', *(f'{count}' for count in _LABELS))]
  for feature in ('hog', 'mean'):
    for k in (50, 100, 1_000, 2_500):
      for rule in ('nearest', 'pursuit', 'random_members'):
        cells = [presence[f'{feature} K={k} {rule} {n}'] for n in _LABELS]
        rows.append((f'{feature}, K = {k}', rule.replace('_', ' '), *cells))
    cells = [
      presence.get(f'{feature} K=100 independent {n}', '') for n in _LABELS
    ]
    rows.append((f'{feature}, K = 100', 'independent clusterings', *cells))
  return rows


def _free(free):
  """Returns the rows of the table of free scenes."""
  return [('labels of', 'bag-of-labels mAP'), *free.items()]


def fill(text: str, made: Mapping[str, str]) -> str:
  """Returns a document with its tables made anew."""
  return re.sub(
    r'(<!-- labels: (\w+) -->\n\n)(?:\|.*\n)*',
    lambda match: match[1] + made[match[2]],
    text,
  )


def main() -> None:
  """Writes the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('results', type=pathlib.Path)
  parser.add_argument('document', type=pathlib.Path)
  arguments = parser.parse_args()
  made = tables(files.read_json(arguments.results))
  with files.atomic(arguments.document) as temporary:
    temporary.write_text(fill(arguments.document.read_text('utf-8'), made))


if __name__ == '__main__':
  main()
