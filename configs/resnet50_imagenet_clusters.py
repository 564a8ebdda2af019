"""ResNet-50 on clusters of ImageNet-1K, the paper's Tables 12 and 13.

The one experiment of the paper that needs no web-scale data: `:imagenet1k` is
TFDS' imagenet2012, prepared with --file_format=array_record, clustered by CLIP
ViT-L/14 into 320,000 classes, the best of Table 12.

  python -m mlcd_jax.main --config=configs/resnet50_imagenet_clusters.py

runs a few steps on the embedded digits: all stages up to the 30th step were
seen to work on two CPU cores, the evaluation after it was not waited for.
The table's other rows are --config.cluster.num_centers=1000 and so on; its 27
data sets are added by --config.evaluate.named=paper. `:imagenet1k`,
`:laion400m`, `:coyo700m` and `:webdataset` were not run either.

The paper gives the number of classes and of labels, the sample rate and the
embedder of this experiment, and nothing else of it. What `presets` has from its
section 4.1, which is about ViTs, is kept: that this holds for its ResNet-50 too
is our guess, and so is what is set here.
"""

from mlcd_jax.config import presets


def get_config(preset=None):
  """Returns the config; see `presets.NAMES` for the argument."""
  config = presets.make(
    preset,
    variant='resnet50',
    embedding_dim=1_024,  # Ours: that of CLIP's ResNet-50.
    image_size=224,
  )
  config.model.pooling = 'average'
  config.model.scan_layers = False  # Its blocks differ.
  if config.data.source != 'embedded':
    config.model.remat = 'none'  # Ours: it fits without (mlcd_jax.plan).
    config.optimizer.b2 = 0.999  # Ours: CLIP's for ResNets.
  return config
