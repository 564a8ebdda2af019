"""What known chips can do, and the FLOPs a model takes.

A multiplication and an addition are two FLOPs. Shapes: B images, L tokens, D
width, F hidden width, C classes, P positives.
"""

from collections.abc import Iterable
import dataclasses

import jax
import ml_collections

from mlcd_jax import models
from mlcd_jax import sampling
from mlcd_jax.models import resnet


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip as its maker states it.

  Attributes:
    flops: a second in bfloat16, dense.
    memory: bytes.
    bandwidth: bytes a second from and to that memory.
  """

  flops: float
  memory: float
  bandwidth: float


# The first name that a jax.Device's device_kind begins with. TPUs: the tables
# of cloud.google.com/tpu/docs; GPUs: NVIDIA's data sheets, SXM modules.
_CHIPS = {
  'TPU v4': Chip(275e12, 32 * 2**30, 1.2e12),
  'TPU v5 lite': Chip(197e12, 16 * 2**30, 819e9),
  'TPU v5': Chip(459e12, 95 * 2**30, 2.765e12),
  'TPU v6 lite': Chip(918e12, 32 * 2**30, 1.64e12),
  'TPU7x': Chip(2307e12, 192 * 2**30, 7.37e12),
  'NVIDIA A100-SXM4-40GB': Chip(312e12, 40e9, 1.555e12),
  'NVIDIA A100': Chip(312e12, 80e9, 2.039e12),
  'NVIDIA H100': Chip(989e12, 80e9, 3.35e12),
  'NVIDIA H200': Chip(989e12, 141e9, 4.8e12),
}


def find(device_kind: str, *, devices_per_chip: int = 1) -> Chip | None:
  """Returns a device's share of its chip, or None where it is not known."""
  for name, chip in _CHIPS.items():
    if device_kind.startswith(name):
      return Chip(*(x / devices_per_chip for x in dataclasses.astuple(chip)))
  return None


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
  """FLOPs a second of all devices in bfloat16; None where not known."""
  chips = [find(device.device_kind) for device in devices]
  return None if None in chips else sum(chip.flops for chip in chips)


def encoder_flops(config: ml_collections.ConfigDict) -> float:
  """FLOPs of one image's way through the encoder.

  Args:
    config: the `model` fields.
  """
  model = models.make(config)
  if isinstance(model, resnet.ResNet):
    return _resnet_flops(model)
  patches = (config.image_size // model.patch_size) ** 2
  tokens = patches + model.has_class_token
  width = model.width
  products = 4 * width**2 + 2 * width * model.mlp_dim
  block = 2 * tokens * products + 4 * tokens**2 * width
  embed = 2 * patches * 3 * model.patch_size**2 * width
  return model.depth * block + embed + 2 * width * config.embedding_dim


def _resnet_flops(model: resnet.ResNet) -> float:
  """The same of convolutions, whose maps are rounded up when they shrink."""
  channels, side = model.width, -(-model.image_size // 2)
  products = 7**2 * 3 * channels * side**2
  side = -(-side // 2)
  for width, stride in model.bottlenecks():
    out = resnet.EXPANSION * width
    products += channels * width * side**2
    side = -(-side // stride)
    products += (3**2 * width**2 + width * out) * side**2
    if (channels, stride) != (out, 1):
      products += channels * out * side**2
    channels = out
  return 2 * (products + channels * model.embedding_dim)


def classifier_flops(
  config: ml_collections.ConfigDict, num_classes: int
) -> float:
  """FLOPs of one image against the classes drawn and its positives.

  Args:
    config: the whole config.
    num_classes: without padding.
  """
  classes = sampling.num_sampled(config.loss, num_classes)
  classes += config.loss.num_positives
  return 2 * classes * config.model.embedding_dim


def train_flops(
  config: ml_collections.ConfigDict, num_classes: int
) -> dict[str, float]:
  """FLOPs of one image in training, by part, without what is recomputed.

  The backward pass takes two products for each of the forward pass.
  """
  return {
    'encoder': 3 * encoder_flops(config.model),
    'classifier': 3 * classifier_flops(config, num_classes),
  }
