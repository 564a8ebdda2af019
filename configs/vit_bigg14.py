"""ViT-bigG/14 at 224 pixels, the size of the largest released weights.

Its recipe is unpublished: the ViT-L/14 one is used, which is our choice.

  python -m mlcd_jax.main --config=configs/vit_bigg14.py

runs a few steps on the embedded digits. Not run: its state takes 30 GB.
`:laion400m`, `:coyo700m`, `:imagenet1k` and `:webdataset` are the real recipes:
not run either.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='bigG/14',
    embedding_dim=1024,  # the released weights.
    image_size=224,
  )
