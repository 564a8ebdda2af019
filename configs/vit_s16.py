r"""ViT-S/16 at 224 pixels: for one's own images on one machine.

  python -m mlcd_jax.main --config=configs/vit_s16.py

runs a few steps on the embedded digits. A folder of one's own images, with
CLIP as the embedder, is

  python -m mlcd_jax.main --config=configs/vit_s16.py:own \
    --config.data.path=photos

Not run with CLIP: that downloads its weights.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='S/16',
    embedding_dim=512,  # That of B/16; the paper has no S.
    image_size=224,
  )
