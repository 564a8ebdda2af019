r"""ViT-B/32 at 224 pixels, the model of the paper's ablations (Tables 5, 6, 7).

  python -m mlcd_jax.main --config=configs/vit_b32.py

runs a few steps on the embedded digits. Not run.
`:laion400m`, `:coyo700m`, `:imagenet1k` and `:webdataset` are the real recipes:
not run either. The ablations of Table 5 are five epochs of it,

  python -m mlcd_jax.main --config=configs/vit_b32.py:laion400m \
    --config.train.epochs=5 --config.cluster.num_labels=32

and its rows that with another --config.cluster.num_centers (a),
--config.loss.sample_rate (b), --config.loss.num_positives, up to 32 (c), or
--config.loss.min_similarity beside 32 positives (d), in a --workdir of its own.
All but (a) share the clusters: --config.cluster.path=runs/vit_b32_laion400m.
Table 6 has 32 epochs, once with --config.loss.name=mlc.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  return presets.make(
    preset,
    variant='B/32',
    embedding_dim=512,  # MLCD Table 9.
    image_size=224,
  )
