"""MLCD on scenes of two to six digits: several labels name several objects.

  python -m mlcd_jax.main --config=configs/scenes.py

Crops of the scenes are clustered, and a scene's labels are the nearest centers
of its crops. `configs/scenes.py:nearest` gives a scene the 8 nearest of 800
centers of whole scenes instead, `:one` the nearest of 200. Every number of
centers and every rate is the best on the validation scenes (docs/evidence.md).

Seen: presence mAP 69 % with labels of crops, 59 % with the others, in about 5
minutes the first and 3 the second, on two cores.
"""

from mlcd_jax import config as config_lib
from mlcd_jax.config import presets
from mlcd_jax.runtime import errors

_PRESETS = ('nearest', 'one')


def get_config(arg=None):
  """Returns the config; `arg` is nothing, 'nearest' or 'one'."""
  if arg and arg not in _PRESETS:
    raise errors.UserError(
      f'configs/scenes.py has no preset {arg!r}; use one of: '
      + ', '.join(_PRESETS)
    )
  config = config_lib.default()
  presets.scenes(config)
  config.cluster.num_centers = 200
  config.cluster.num_labels = 8
  config.cluster.tolerance = 1e-4
  config.model.variant = 'resnet_nano'
  config.model.image_size = 40  # Digits of 11 to 18 pixels.
  config.model.embedding_dim = 128
  config.model.pooling = 'average'
  config.model.dtype = 'float32'  # CPUs are slower in bfloat16.
  config.optimizer.learning_rate = 8e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.b2 = 0.98
  config.train.steps = 400  # The studies have 600.
  config.train.batch_size = 128
  config.train.checkpoint_every_steps = 150
  config.train.log_every_steps = 20
  if not arg:
    # A crop is about as large as a digit's canvas.
    config.embed.image_size = 28
    config.embed.views = (1, 2, 3)
    config.cluster.fit_on = 'views'
    config.cluster.rule = 'views'
  if arg == 'nearest':
    config.cluster.num_centers = 800
  if arg == 'one':
    config.optimizer.learning_rate = 4e-3
    config.loss.name = 'softmax'
    config.loss.num_positives = 1
    config.loss.scale = 32.0
  return config
