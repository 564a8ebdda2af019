"""The table of all config fields.

A new field needs one row in the file of its stage (`embedding`, `clustering`,
`training` or `evaluation`), and the code that uses it. The row gives the
default, the range, the choices and the stages. docs/config.md is generated from
it too.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from mlcd_jax.config import clustering
from mlcd_jax.config import embedding
from mlcd_jax.config import evaluation
from mlcd_jax.config import training
from mlcd_jax.config.field import CLUSTER
from mlcd_jax.config.field import EVALUATE
from mlcd_jax.config.field import Field
from mlcd_jax.config.field import MOST
from mlcd_jax.config.field import TRAIN

FIELDS = (
  Field(
    'seed',
    0,
    'Seed of all randomness.',
    low=0,
    high=MOST,
    stages=(CLUSTER, TRAIN, EVALUATE),
  ),
  *embedding.FIELDS,
  *clustering.FIELDS,
  *training.FIELDS,
  *evaluation.FIELDS,
)

NAMES = tuple(field.name for field in FIELDS)


def default() -> ml_collections.ConfigDict:
  """Returns a config with every field at its default."""
  config = ml_collections.ConfigDict()
  for field in FIELDS:
    section, _, name = field.name.rpartition('.')
    if section and section not in config:
      config[section] = ml_collections.ConfigDict()
    (config[section] if section else config)[name] = field.default
  return config


def get(config: Mapping[str, Any], name: str) -> Any:
  """Returns the value of a dotted field."""
  value = config
  for part in name.split('.'):
    value = value[part]
  return value


def of_stage(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
  """Returns the fields that a stage's files depend on, by dotted name.

  Args:
    config: the result of `config.to_dict`.
    stage: embed, cluster, train or evaluate.
  """
  values = {}
  for field in FIELDS:
    if stage in field.stages:
      values |= _flat(field.name, get(config, field.name))
  return values


def _flat(name: str, value: Any) -> dict[str, Any]:
  if not isinstance(value, dict):
    return {name: value}
  values = {}
  for key, inner in value.items():
    values |= _flat(f'{name}.{key}', inner)
  return values


def page() -> str:
  """Returns the text of docs/config.md, with one table for each section."""
  lines = [
    '# Settings',
    '',
    'Set any field on the command line, such as `--config.loss.scale=64`. A',
    'stage is made anew only by hand: a finished one stops a run whose fields',
    'of that stage differ. `make docs` writes this page from the fields.',
  ]
  last = None
  for field in FIELDS:
    section = field.name.partition('.')[0]
    if section != last:
      lines += [
        '',
        f'## {section}',
        '',
        '| field | default | values | what it does | stages |',
        '|---|---|---|---|---|',
      ]
      last = section
    cells = (
      f'`{field.name}`',
      f'`{field.default!r}`',
      _values(field),
      field.text,
      ', '.join(field.stages),
    )
    row = ' | '.join(cell.replace('|', r'\|') for cell in cells)
    lines.append(f'| {row} |')
  return '\n'.join(lines) + '\n'


def _values(field: Field) -> str:
  if field.choices:
    return ', '.join(f'`{choice}`' for choice in field.choices)
  if field.low is None:
    return ''
  high = '' if field.high == MOST else f' to {field.high:g}'
  return f'from {field.low:g}{high}'
