"""Eight CPU devices in one process, strict broadcasting, compile caches."""

import os
import pathlib

from absl import flags
import jax
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import presets

_ROOT = pathlib.Path(__file__).parent.parent


def _take_one_core():
  """Of several processes of tests, each has a core: threads do not compete."""
  worker = os.environ.get('PYTEST_XDIST_WORKER')
  if worker and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix('gw'))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


_take_one_core()

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(_ROOT / '.cache/jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

# Grain's worker processes read absl's flags.
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def tiny_config():
  """The whole job on the digits, shrunk to seconds."""
  config = config_lib.default()
  presets.digits(config)
  config.data.split = 'train[:300]'
  config.embed.shard_rows = 100
  config.cluster.num_centers = 64
  config.cluster.iterations = 5
  config.model.variant = 'Nano/14'
  config.model.image_size = 28
  config.model.embedding_dim = 32
  config.model.pooling = 'average'
  config.model.dtype = 'float32'
  config.train.steps = 12
  config.train.batch_size = 32
  config.train.checkpoint_every_steps = 4
  config.train.log_every_steps = 1
  config.evaluate.batch_size = 64
  config.evaluate.datasets.digits.train_split = 'train[:300]'
  config.evaluate.datasets.digits.test_split = 'test[:100]'
  return config
