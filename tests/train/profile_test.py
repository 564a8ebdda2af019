"""The trace of some steps of a run."""

import gzip
import json

import jax.numpy as jnp
import pytest

from mlcd_jax.config import check
from mlcd_jax.runtime import errors
from mlcd_jax.train import profile


def run(folder, wanted, steps):
  with profile.Trace(wanted, folder) as trace:
    for number in steps:
      with trace.step(number):
        metrics = {'loss': jnp.ones(3).sum()}
      trace.dispatched(number, metrics)


def traced(folder):
  """The numbers of the steps in the trace."""
  (path,) = folder.glob('plugins/profile/*/*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  return [
    int(event['args']['step_num'])
    for event in events
    if event.get('name') == 'train' and 'args' in event
  ]


@pytest.mark.parametrize(
  ('wanted', 'steps', 'expected'),
  [
    ((2, 3), range(1, 6), [2, 3]),
    ((2, 9), range(1, 4), [2, 3]),  # The run ends before.
    ((2, 5), range(4, 8), [4, 5]),  # It went on after a stop.
  ],
)
def test_the_wanted_steps_are_traced(tmp_path, wanted, steps, expected):
  run(tmp_path, wanted, steps)
  assert sorted(set(traced(tmp_path))) == expected


def test_without_steps_nothing_is_written(tmp_path):
  run(tmp_path, (), range(1, 4))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('wanted', [(3,), (0, 2), (4, 2), (1.0, 2)])
def test_steps_that_are_none_are_refused(tiny_config, wanted):
  tiny_config.train.profile_steps = wanted
  with pytest.raises(errors.UserError, match='train.profile_steps=.*first'):
    check.check(tiny_config)
