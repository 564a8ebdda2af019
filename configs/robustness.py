r"""Zero-shot on ImageNet and the shifted sets of MLCD's Table 4.

  python -m mlcd_jax.main --config=configs/robustness.py --stages=evaluate \
    --config.evaluate.encoder=FOLDER

scores a CLIP folder with its own text tower; `:imagenet_a,imagenet_r` picks
some sets. ImageNet and four others are TFDS data sets that must be prepared
(tfds build imagenet_a --file_format=array_record), ObjectNet is a folder named
by --config.evaluate.datasets.objectnet.path. For an encoder without a text
tower, --config.lit.steps and --config.data.* say on what one is tuned. Not run:
the data must be downloaded.
"""

from mlcd_jax.config import presets


def get_config(arg=None):
  """Returns the config; see `presets.ROBUSTNESS` for the names in `arg`."""
  config = presets.make('webdataset', variant='B/16', embedding_dim=512)
  presets.robustness(config, *(arg.split(',') if arg else ()))
  config.evaluate.tasks = ('zero_shot',)
  config.lit.steps = 0
  return config
