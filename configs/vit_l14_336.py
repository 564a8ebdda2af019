"""ViT-L/14 at 336 pixels, as the paper's encoder for LLaVA (Table 8).

The paper trains it for one more epoch from the 224-pixel model; this config
trains it from scratch.

  python -m mlcd_jax.main --config=configs/vit_l14_336.py

runs a few steps on the embedded digits. Not run.
`:laion400m`, `:coyo700m`, `:imagenet1k` and `:webdataset` are the real recipes:
not run either.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='L/14',
    embedding_dim=768,  # MLCD Table 9.
    image_size=336,
  )
