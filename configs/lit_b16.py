r"""Zero-shot and retrieval of a ViT-B/16 by locked-image tuning.

  python -m mlcd_jax.main --config=configs/lit_b16.py --workdir=runs/vit_b16 \
    --stages=evaluate

tunes a text tower to the encoder that configs/vit_b16.py trained, in its
workdir; with --config.evaluate.encoder=FOLDER to any other. `:laion400m` and
the other presets are the real recipe. None of it was run; the small twin,
configs/quickstart.py:lit, was. Each host holds the features of all captioned
images, 3 KB each: name as many tars in --config.data.path as it has memory for.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  config = presets.make(
    preset,
    variant='B/16',
    embedding_dim=512,  # MLCD Table 9.
    image_size=224,
  )
  presets.lit(config)
  return config
