"""ViT-L/14 at 224 pixels, the paper's main model (Tables 1 to 4).

  python -m mlcd_jax.main --config=configs/vit_l14.py

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
    image_size=224,
  )
