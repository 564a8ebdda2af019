"""What is written, and what a continued run writes again."""

import json

from mlcd_jax import metrics


def steps(path):
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_continued_run_drops_what_it_writes_again(tmp_path):
  writer = metrics.Writer(tmp_path, first_step=1)
  for step in range(1, 6):
    writer.write(step, {'train/loss': float(step)})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 6, "tra')  # Killed in a line.

  writer = metrics.Writer(tmp_path, first_step=4)
  writer.write(4, {'train/loss': 40.0})
  writer.close()
  assert steps(path) == [1, 2, 3, 4]
  last = json.loads(path.read_text().splitlines()[-1])
  assert last == {'step': 4, 'train/loss': 40.0}
  assert list((tmp_path / 'tensorboard').iterdir())


def test_time():
  assert metrics._time(3_725) == '1:02:05'
  assert metrics._time(float('inf')) == '?'


def test_speed():
  def speed(**fields):
    return metrics.Progress('x', 9, unit='points', **fields)._speed(1_000.0)

  assert speed() == ''
  assert speed(flops=2e9) == '2 TFLOP/s '
  assert speed(flops=2e9, peak_flops=1e13) == '2 TFLOP/s (20% of peak) '
