"""ViT-B/32 at 224 pixels, the model of the paper's ablations (Tables 5, 6, 7).

  python -m mlcd_jax.main --config=configs/vit_b32.py --workdir=runs/b32

runs a few steps on the embedded digits. Not run.
`:laion400m`, `:coyo700m`, `:imagenet1k` and `:webdataset` are the real recipes:
not run either.
"""

from mlcd_jax import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='B/32',
    embedding_dim=512,  # MLCD Table 9.
    image_size=224,
  )
