"""The table of fields, and what is made from it."""

import collections
import pathlib

from mlcd_jax import config as config_lib
from mlcd_jax.config import check
from mlcd_jax.config import fields

_PAGE = pathlib.Path(__file__).parents[2] / 'docs/config.md'


def test_the_page_is_what_the_rows_say():
  assert _PAGE.read_text('utf-8') == fields.page()


def test_every_field_stands_once_and_says_what_it_does():
  count = collections.Counter(fields.NAMES)
  assert set(count.values()) == {1}
  assert not [f.name for f in fields.FIELDS if len(f.text) < 10]


def test_a_default_is_among_its_choices_and_in_its_range():
  for field in fields.FIELDS:
    assert not field.choices or field.default in field.choices
    assert field.low is None or field.low <= field.default <= field.high


def test_a_stage_depends_on_its_fields_alone():
  config = config_lib.default()
  config_lib.add_dataset(config, 'mine', path='x')

  def names(stage):
    return set(fields.of_stage(config_lib.to_dict(config), stage))

  assert 'cluster.num_centers' in names('cluster')
  assert 'cluster.num_centers' not in names('embed') | names('evaluate')
  assert 'evaluate.datasets.mine.path' in names('evaluate')
  # What changes memory and speed alone is of no stage.
  for name in ('model.remat', 'model.scan_layers', 'loss.chunk_megabytes'):
    assert name not in names('train')
  assert 'model.variant' in names('train')


def test_a_complete_config_passes(tiny_config):
  check.check(tiny_config)
