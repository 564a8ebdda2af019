"""ViT-B/16 at 224 pixels (the paper's Table 9).

  python -m mlcd_jax.main --config=configs/vit_b16.py

runs a few steps on the embedded digits. It was seen to take 7 minutes on
two busy cores; 30 steps teach it nothing (linear probe 89 %, before them 90 %).
`:laion400m`, `:coyo700m`, `:imagenet1k` and `:webdataset` are the real recipes:
not run.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='B/16',
    embedding_dim=512,  # MLCD Table 9.
    image_size=224,
  )
