"""metrics.jsonl as columns."""

import json

import pytest

from mlcd_jax.page import curves


def write(folder, rows, end=''):
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(lines + end)


def test_nothing_trained(tmp_path):
  assert curves.read(tmp_path) == {'step': [], 'values': {}}
  write(tmp_path, [])
  assert curves.read(tmp_path) == {'step': [], 'values': {}}


def test_columns_with_gaps_and_a_line_cut_short(tmp_path):
  write(tmp_path, [{'step': 1, 'a': 2.0}, {'step': 5, 'b': 3.0}], '{"step": 9')
  assert curves.read(tmp_path) == {
    'step': [1, 5],
    'values': {'a': [2.0, None], 'b': [None, 3.0]},
  }


def test_long_runs_are_thinned_and_keep_their_end(tmp_path):
  write(tmp_path, [{'step': i, 'a': float(i)} for i in range(1, 2_503)])
  found = curves.read(tmp_path)
  assert 800 < len(found['step']) <= 1_000
  assert found['step'][-1] == 2_502
  assert found['values']['a'] == [float(s) for s in found['step']]


@pytest.mark.parametrize(
  'broken',
  [
    b'\xff\xfe\x00 caf\xe9',
    b'{"step": 2, "a": "\xe9"}',
    b'\0\0\0\0\0',
    b'{"step": "x"}',
    b'[1]',
  ],
)
def test_broken_lines_are_left_out(tmp_path, broken):
  lines = [b'{"step": 1, "a": 2.0}', broken, b'{"step": 3, "a": 4.0}', b'']
  (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
  assert curves.read(tmp_path) == {'step': [1, 3], 'values': {'a': [2.0, 4.0]}}
