"""Bottleneck ResNets with batch normalisation, in Linen.

Shapes: B images, H W pixels or positions of a map, L positions of the last
map, D channels.
"""

from collections.abc import Iterator

from flax import linen as nn
import jax
import jax.numpy as jnp

from mlcd_jax.models import layers
from mlcd_jax.models import vit
from mlcd_jax.models.batch_norm import BatchNorm

# The sizes of He et al. (2016), Table 1. resnet_nano is ours, for digits at 32
# pixels.
VARIANTS = {
  'resnet_nano': dict(width=16, blocks=(1, 1)),
  'resnet50': dict(width=64, blocks=(3, 4, 6, 3)),
}

REMAT = ('none', 'full')

# A bottleneck's output channels per inner channel (He et al. 2016).
EXPANSION = 4


class ResNet(nn.Module):
  """An encoder from images to a map, pooled features and an embedding.

  This is version 1.5, as in torchvision, timm and transformers: the 3 x 3
  convolution of a bottleneck has the stride. The last gain of every block
  starts at zero (Goyal et al. 2017, section 5.1).

  Attributes:
    width: the channels of the stem and inside the bottlenecks of stage 1.
    blocks: the number of blocks in each stage. Each stage has twice the
      channels of the previous one.
    embedding_dim: the width of the projection; 0 = no projection, so that the
      embedding is the pooled features.
    dtype: the type of convolutions and maps. Weights and statistics stay
      float32.
    image_size: the side of training images in pixels; other sizes work too.
    mean: the RGB mean to subtract from uint8 images, for values in 0 .. 1.
    std: the RGB standard deviation to divide by, for values in 0 .. 1.
    remat: one of REMAT. The backward pass keeps all it needs ('none'), or only
      the input of each block ('full').
  """

  width: int
  blocks: tuple[int, ...]
  embedding_dim: int
  dtype: jnp.dtype
  image_size: int = 0
  mean: tuple[float, ...] = vit.CLIP_MEAN
  std: tuple[float, ...] = vit.CLIP_STD
  remat: str = 'none'

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    weight_B: jax.Array | None = None,
    drop_path_key: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Encodes images.

    Args:
      images: uint8 [B, H, W, 3], or floats that are normalised already.
      weight_B: in training, the weights of the images in the statistics of
        the batch; None = use the running averages.
      drop_path_key: not used; ViTs have the same interface.

    Returns:
      A dict of float32 arrays: hidden and tokens, both the last map [B, L, D];
      pooled, its mean [B, D]; and embedding [B, embedding_dim].
    """
    del drop_path_key
    x = layers.normalise(images, self.mean, self.std).astype(self.dtype)
    x = _conv(self.width, 7, 2, self.dtype, 'stem_conv')(x)
    x = nn.relu(BatchNorm(self.dtype, name='stem_norm')(x, weight_B))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    block = Bottleneck if self.remat == 'none' else nn.remat(Bottleneck)
    for i, (width, stride) in enumerate(self.bottlenecks()):
      x = block(width, stride, self.dtype, name=f'block_{i:02d}')(x, weight_B)
    tokens_BLD = x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32)
    pooled_BD = embedding = tokens_BLD.mean(axis=1)
    if self.embedding_dim:
      project = layers.projection(
        pooled_BD.shape[-1], self.embedding_dim, self.dtype
      )
      embedding = project(pooled_BD)
    return {
      'hidden': tokens_BLD,
      'tokens': tokens_BLD,
      'pooled': pooled_BD,
      'embedding': embedding,
    }

  def bottlenecks(self) -> Iterator[tuple[int, int]]:
    """Yields (inner width, stride) for every block."""
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        # The first block of every stage but the first halves the map.
        yield self.width * 2**stage, 2 if stage and not i else 1

  @property
  def depth(self) -> int:
    """Returns the number of blocks."""
    return sum(self.blocks)

  @property
  def patch_size(self) -> int:
    """Returns the image side divided by that of the last map."""
    # The stem halves the side twice, and each later stage once.
    return 2 ** (len(self.blocks) + 1)


class Bottleneck(nn.Module):
  """1 x 1, 3 x 3 and 1 x 1 convolutions with a skip connection.

  Attributes:
    width: the channels of the first two convolutions.
    stride: the stride of the 3 x 3 convolution.
    dtype: the type of convolutions and maps.
  """

  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, weight_B: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, channels] to [B, H / stride, W / stride, 4 * width]."""
    out = EXPANSION * self.width
    y = x
    for i, (channels, size, stride) in enumerate(
      ((self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)), 1
    ):
      y = _conv(channels, size, stride, self.dtype, f'conv_{i}')(y)
      last = dict(scale_init=nn.initializers.zeros) if i == 3 else {}
      y = BatchNorm(self.dtype, **last, name=f'norm_{i}')(y, weight_B)
      y = y if last else nn.relu(y)
    if x.shape != y.shape:
      x = _conv(out, 1, self.stride, self.dtype, 'shortcut_conv')(x)
      x = BatchNorm(self.dtype, name='shortcut_norm')(x, weight_B)
    return nn.relu(x + y)


def _conv(
  channels: int, size: int, stride: int, dtype: jnp.dtype, name: str
) -> nn.Conv:
  """Makes a convolution with PyTorch's padding and He et al. (2015) weights."""
  return nn.Conv(
    channels,
    (size, size),
    (stride, stride),
    padding=size // 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    name=name,
  )
