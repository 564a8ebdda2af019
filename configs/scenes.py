"""MLCD on scenes of two to six digits: several labels name several objects.

  python -m mlcd_jax.main --config=configs/scenes.py

Crops of the scenes are clustered, and a scene's labels are the nearest centers
of its crops.

Seen: not run to the end yet.
"""

from mlcd_jax import config as config_lib
from mlcd_jax.config import presets
from mlcd_jax.runtime import errors


def get_config(arg=None):
  """Returns the config; it takes no argument."""
  if arg:
    raise errors.UserError(f'configs/scenes.py has no preset {arg!r}')
  config = config_lib.default()
  presets.scenes(config)
  config.embed.image_size = 28  # A crop is about as large as a digit's canvas.
  config.embed.views = (1, 2, 3)
  config.cluster.fit_on = 'views'
  config.cluster.rule = 'views'
  config.cluster.tolerance = 1e-4
  config.model.variant = 'resnet_nano'
  config.model.image_size = 64
  config.model.embedding_dim = 128
  config.model.pooling = 'average'
  config.model.dtype = 'float32'  # CPUs are slower in bfloat16.
  config.optimizer.learning_rate = 4e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.b2 = 0.98
  config.train.steps = 900
  config.train.batch_size = 128
  config.train.checkpoint_every_steps = 150
  config.train.log_every_steps = 20
  return config
