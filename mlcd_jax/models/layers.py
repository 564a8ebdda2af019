"""Layers of the vision and text transformers.

Shapes: B images, L tokens, M tokens attended to, D width, N heads, K width of a
head, F hidden width of an MLP.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from mlcd_jax.models import matmul
from mlcd_jax.models import positions

# The standard deviation that ViT code commonly uses (timm, big_vision).
normal = nn.initializers.truncated_normal(0.02)

# Initial value of LayerScale in DINOv2's released configs.
_LAYER_SCALE = 1.0

_ACTIVATIONS = {
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  # The approximation in OpenAI's CLIP (Hendrycks and Gimpel 2016).
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}
# 'swiglu' (Shazeer 2020) is no elementwise function: one half of the hidden
# layer gates the other, see `mlp`.
ACTIVATIONS = (*_ACTIVATIONS, 'swiglu')


class Block(nn.Module):
  """A pre-norm transformer block: attention and MLP with skip connections.

  Attributes:
    heads: the number of attention heads.
    mlp_dim: the hidden width of the MLP.
    dtype: the type of the operands of products.
    activation: one of ACTIVATIONS.
    layer_scale: multiply each branch by a learned vector.
    norm_epsilon: the epsilon of both norms.
    causal: hide later tokens from earlier ones.
  """

  heads: int
  mlp_dim: int
  dtype: jnp.dtype
  activation: str = 'gelu'
  layer_scale: bool = False
  norm_epsilon: float = 1e-5
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    weights: jax.Array | None = None,
    rotation: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Transforms tokens, float32 [B, L, D] in and out.

    Args:
      x_BLD: the tokens.
      weights: factors of the attention and MLP branches, [2, B, 1, 1]; 0 drops
        a branch.
      rotation: cosines and sines [L, K] of rotary positions.
    """
    y_BLD = norm(self.norm_epsilon, 'attention_norm')(x_BLD)
    attention = Attention(self.heads, self.dtype, self.causal, name='attention')
    y_BLD = self._scaled('attention_scale', attention(y_BLD, rotation))
    x_BLD = x_BLD + (y_BLD if weights is None else weights[0] * y_BLD)
    y_BLD = norm(self.norm_epsilon, 'mlp_norm')(x_BLD)
    y_BLD = mlp(y_BLD, self.mlp_dim, self.activation, self.dtype)
    y_BLD = self._scaled('mlp_scale', y_BLD)
    return x_BLD + (y_BLD if weights is None else weights[1] * y_BLD)

  def _scaled(self, name: str, y_BLD: jax.Array) -> jax.Array:
    """Applies LayerScale (Touvron et al. 2021) if the block has it."""
    if not self.layer_scale:
      return y_BLD
    init = nn.initializers.constant(_LAYER_SCALE)
    return y_BLD * self.param(name, init, (y_BLD.shape[-1],))[None, None]


class Attention(nn.Module):
  """Multi-head self-attention.

  Attributes:
    heads: the number of attention heads.
    dtype: the type of the operands of products.
    causal: hide later tokens from earlier ones.
  """

  heads: int
  dtype: jnp.dtype
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Applies attention to tokens, float32 [B, L, D] in and out.

    Args:
      x_BLD: the tokens.
      rotation: cosines and sines [L, K] of rotary positions.
    """
    width = x_BLD.shape[-1]
    head_dim = width // self.heads
    qkv = Dense(3 * width, self.dtype, name='qkv')(x_BLD).astype(self.dtype)
    qkv = qkv.reshape(*x_BLD.shape[:2], 3, self.heads, head_dim)
    # With heads before tokens, products run over the last two axes.
    q_BNLK, k_BNLK, v_BNLK = jnp.unstack(qkv.transpose(2, 0, 3, 1, 4))
    if rotation is not None:
      q_BNLK = positions.rotate(q_BNLK, rotation)
      k_BNLK = positions.rotate(k_BNLK, rotation)
    y_BNLK = _attend(q_BNLK, k_BNLK, v_BNLK, self.dtype, self.causal)
    y_BLD = y_BNLK.transpose(0, 2, 1, 3).reshape(x_BLD.shape)
    return Dense(width, self.dtype, name='out')(y_BLD)


class AttentionPool(nn.Module):
  """SigLIP's pooling: a learned query attends to all tokens, then an MLP."""

  heads: int
  mlp_dim: int
  dtype: jnp.dtype
  activation: str
  norm_epsilon: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    """Pools tokens, float32 [B, L, D], to [B, D]."""
    batch, _, width = x_BLD.shape
    head_dim = width // self.heads
    probe = self.param('probe', normal, (1, 1, width))
    query = Dense(width, self.dtype, name='query')(probe).astype(self.dtype)
    q_BN1K = jnp.broadcast_to(
      query.reshape(1, self.heads, 1, head_dim),
      (batch, self.heads, 1, head_dim),
    )
    kv = Dense(2 * width, self.dtype, name='key_value')(x_BLD)
    kv = kv.astype(self.dtype).reshape(batch, -1, 2, self.heads, head_dim)
    k_BNLK, v_BNLK = jnp.unstack(kv.transpose(2, 0, 3, 1, 4))
    y_BN1K = _attend(q_BN1K, k_BNLK, v_BNLK, self.dtype)
    y_B1D = Dense(width, self.dtype, name='out')(
      y_BN1K.reshape(batch, 1, width)
    )
    z_B1D = norm(self.norm_epsilon, 'norm')(y_B1D)
    z_B1D = mlp(z_B1D, self.mlp_dim, self.activation, self.dtype)
    return (y_B1D + z_B1D)[:, 0]


class Patches(nn.Module):
  """The patch embedding: a strided convolution, written as one product."""

  width: int
  patch_size: int
  dtype: jnp.dtype
  use_bias: bool = False

  @nn.compact
  def __call__(self, images_BHWC: jax.Array) -> jax.Array:
    """Embeds images, float32 [B, H, W, 3], as tokens [B, L, D].

    Rows and columns beyond the last whole patch are cut off.
    """
    batch, height, width, channels = images_BHWC.shape
    p = self.patch_size
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (p, p, channels, self.width)
    )
    rows, columns = height // p, width // p
    x = images_BHWC[:, : rows * p, : columns * p]
    x = x.reshape(batch, rows, p, columns, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    y = _flat_matmul(x, kernel.reshape(-1, self.width), self.dtype)
    if not self.use_bias:
      return y
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    return y + bias[None, None]


class Dense(nn.Module):
  """A linear layer with products in `dtype` and a float32 result."""

  features: int
  dtype: jnp.dtype
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to float32 [..., features]."""
    kernel = self.param(
      'kernel', self.kernel_init, (x.shape[-1], self.features)
    )
    y = _flat_matmul(x, kernel, self.dtype)
    if not self.use_bias:
      return y
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def mlp(
  x_BLD: jax.Array, hidden: int, activation: str, dtype: jnp.dtype
) -> jax.Array:
  """Applies the MLP of a block, float32 [B, L, D] in and out.

  Its layers become submodules of the calling module.

  Args:
    x_BLD: the tokens.
    hidden: F, the hidden width.
    activation: one of ACTIVATIONS.
    dtype: the type of the operands of products.
  """
  gated = activation == 'swiglu'
  y_BLF = Dense(hidden * (1 + gated), dtype, name='mlp_in')(x_BLD)
  if gated:
    gate, y_BLF = jnp.split(y_BLF, 2, axis=-1)
    y_BLF = nn.silu(gate) * y_BLF
  else:
    y_BLF = _ACTIVATIONS[activation](y_BLF)
  return Dense(x_BLD.shape[-1], dtype, name='mlp_out')(y_BLF)


def projection(width: int, features: int, dtype: jnp.dtype) -> Dense:
  """Makes the linear layer from pooled features to the embedding.

  Args:
    width: the width of the pooled features.
    features: the width of the embedding.
    dtype: the type of the operands of the product.
  """
  return Dense(
    features,
    dtype,
    use_bias=False,
    kernel_init=nn.initializers.normal(width**-0.5),  # As in CLIP.
    name='projection',
  )


def normalise(
  images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Normalises uint8 images to float32 [B, H, W, 3].

  Args:
    images: RGB, uint8 [B, H, W, 3]. Floats count as normalised already and are
      only cast.
    mean: the RGB mean to subtract, for values in 0 .. 1.
    std: the RGB standard deviation to divide by, for values in 0 .. 1.
  """
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images.astype(jnp.float32)
  mean, std = jnp.asarray(mean), jnp.asarray(std)
  scaled = images.astype(jnp.float32) / 255
  return (scaled - mean[None, None, None]) / std[None, None, None]


def norm(epsilon: float, name: str) -> nn.LayerNorm:
  """Makes a LayerNorm that computes in float32."""
  return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def _attend(
  q_BNLK: jax.Array,
  k_BNMK: jax.Array,
  v_BNMK: jax.Array,
  dtype: jnp.dtype,
  causal: bool = False,
) -> jax.Array:
  """Computes attention, [B, N, L, K], with scores and softmax in float32."""
  scores = jnp.einsum(
    'BNLK,BNMK->BNLM',
    q_BNLK,
    k_BNMK,
    preferred_element_type=jnp.float32,
  )
  if causal:
    # Before the scaling, which leaves -inf as it is.
    seen_LM = jnp.tri(*scores.shape[-2:], dtype=bool)
    scores = jnp.where(seen_LM[None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores * q_BNLK.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum('BNLM,BNMK->BNLK', weights.astype(dtype), v_BNMK)


def _flat_matmul(
  x: jax.Array, kernel: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Multiplies x [..., D] by kernel [D, F], with leading axes of x flattened.

  With one leading axis the gradient of the kernel is a sum over one axis. XLA's
  CPU back end is slow at sums over several axes.
  """
  out = matmul.matmul(x.reshape(-1, x.shape[-1]), kernel, dtype)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])
