"""Eight CPU devices, strict broadcasting, and programs that compile quickly.

`make test-slow` sets XLA_FLAGS to nothing, and so has the optimizer users have.
"""

import os
import pathlib

from absl import flags
import jax
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.config import presets
from mlcd_jax.models import vit

_ROOT = pathlib.Path(__file__).parent.parent


def _take_one_core():
  """Gives each of several processes a core: threads do not compete."""
  worker = os.environ.get('PYTEST_XDIST_WORKER')
  if worker and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix('gw'))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


_take_one_core()

# Most programs of the tests run a few times: without LLVM's optimizations and
# the MLIR fusion emitters they compile in about a third of the time. Processes
# that a test starts inherit it.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
)

# Smaller than any that users can name: each block is compiled anew.
vit.VARIANTS['Pico'] = dict(width=48, depth=2, heads=3, mlp_dim=96)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(_ROOT / '.cache/jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

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
  config.model.variant = 'Pico/14'
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
  config.evaluate.datasets.digits.validation_split = 'validation[:60]'
  config.evaluate.datasets.digits.test_split = 'test[:100]'
  return config
