"""FLOPs of the encoder and the classifier per image.

Only matrix products and convolutions count. A multiply-add is two FLOPs.
"""

import ml_collections

from mlcd_jax import models
from mlcd_jax.models import resnet
from mlcd_jax.train import sampling


def encoder_flops(config: ml_collections.ConfigDict) -> float:
  """Returns the FLOPs of one image's forward pass through the encoder.

  Args:
    config: the `model` fields.
  """
  model = models.make(config)
  if isinstance(model, resnet.ResNet):
    return _resnet_flops(model)
  patches = (config.image_size // model.patch_size) ** 2
  tokens = patches + model.has_class_token
  width = model.width
  # Queries, keys, values and output; then the two layers of the MLP.
  products = 4 * width**2 + 2 * width * model.mlp_dim
  # The second term is attention: scores and weighted values.
  block = 2 * tokens * products + 4 * tokens**2 * width
  embed = 2 * patches * 3 * model.patch_size**2 * width
  return model.depth * block + embed + 2 * width * config.embedding_dim


def _resnet_flops(model: resnet.ResNet) -> float:
  """Returns the FLOPs of one image's forward pass through a ResNet."""
  # -(-a // b) rounds up, as a strided convolution does.
  channels, side = model.width, -(-model.image_size // 2)
  products = 7**2 * 3 * channels * side**2
  side = -(-side // 2)  # Max pooling.
  for width, stride in model.bottlenecks():
    out = resnet.EXPANSION * width
    products += channels * width * side**2
    side = -(-side // stride)
    # The 3 x 3 convolution has the stride; the last is 1 x 1.
    products += (3**2 * width**2 + width * out) * side**2
    if (channels, stride) != (out, 1):  # Then the shortcut is a convolution.
      products += channels * out * side**2
    channels = out
  return 2 * (products + channels * model.embedding_dim)


def classifier_flops(
  config: ml_collections.ConfigDict, num_classes: int
) -> float:
  """Returns the FLOPs of one image's products with classes, forward pass.

  The classes are those drawn in a step and the positives of the image.

  Args:
    config: the whole config.
    num_classes: the number of classes without padding.
  """
  classes = sampling.num_sampled(config.loss, num_classes)
  classes += config.loss.num_positives
  return 2 * classes * config.model.embedding_dim


def train_flops(
  config: ml_collections.ConfigDict, num_classes: int
) -> dict[str, float]:
  """Returns the training FLOPs of one image, by part.

  Recomputation (model.remat, chunks) is not counted.

  Args:
    config: the whole config.
    num_classes: the number of classes without padding.
  """
  # The backward pass takes two products for each product of the forward pass.
  return {
    'encoder': 3 * encoder_flops(config.model),
    'classifier': 3 * classifier_flops(config, num_classes),
  }
