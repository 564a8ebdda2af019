"""MLCD on 5,000 handwritten digits: minutes on two CPU cores.

  python -m mlcd_jax.main --config=configs/quickstart.py

`configs/quickstart.py:lit` with --stages=evaluate --workdir=runs/quickstart
scores the same run by texts: zero-shot and retrieval, with a text tower tuned
on the digits' captions.

Seen: linear probe 94 %, kNN 94 %, 20 labels a class 88 to 91 %, in 5 minutes.
"""

from mlcd_jax import config as config_lib
from mlcd_jax.config import presets
from mlcd_jax.runtime import errors


def get_config(arg=None):
  """Returns the config; `arg` is nothing or 'lit'."""
  if arg not in (None, '', 'lit'):
    raise errors.UserError(
      f'configs/quickstart.py has no preset {arg!r}; use lit'
    )
  config = config_lib.default()
  presets.digits(config)
  # The centers are at rest after three or four passes.
  config.cluster.tolerance = 1e-6
  config.model.variant = 'Nano/7'
  config.model.image_size = 28
  config.model.embedding_dim = 128
  config.model.pooling = 'average'
  config.model.dtype = 'float32'  # CPUs are slower in bfloat16.
  config.optimizer.learning_rate = 4e-3  # The best of docs/evidence.md.
  config.optimizer.weight_decay = 0.05
  config.optimizer.b2 = 0.98
  config.train.steps = 900
  config.train.batch_size = 128
  config.train.checkpoint_every_steps = 150
  config.train.log_every_steps = 20
  if arg:
    presets.lit(config)
  return config
