"""The parts of a vision transformer.

Shapes: B images, L tokens, D width, N heads, K width of a head, F hidden width
of an MLP.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from mlcd_jax.models import matmul
from mlcd_jax.models import positions

normal = nn.initializers.truncated_normal(0.02)

# LayerScale's first value in DINOv2's configs.
_LAYER_SCALE = 1.0

_ACTIVATIONS = {
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP.
}
# 'swiglu' (Shazeer 2020) gates one half of the hidden layer by the other.
ACTIVATIONS = (*_ACTIVATIONS, 'swiglu')


class Block(nn.Module):
  """Attention and MLP, each after a norm and beside a skip connection."""

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
    """Float32 [B, L, D] to the same.

    Args:
      x_BLD: tokens.
      weights: [2, B, 1, 1], of the two branches.
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
    """LayerScale (Touvron et al. 2021), if there is one."""
    if not self.layer_scale:
      return y_BLD
    init = nn.initializers.constant(_LAYER_SCALE)
    return y_BLD * self.param(name, init, (y_BLD.shape[-1],))[None, None]


class Attention(nn.Module):
  """Multi-head self-attention; of a causal one no token sees later ones."""

  heads: int
  dtype: jnp.dtype
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Float32 [B, L, D] to the same; see `Block` for the rotation."""
    width = x_BLD.shape[-1]
    head_dim = width // self.heads
    qkv = Dense(3 * width, self.dtype, name='qkv')(x_BLD).astype(self.dtype)
    qkv = qkv.reshape(*x_BLD.shape[:2], 3, self.heads, head_dim)
    # Heads before tokens: products then run over the last two axes.
    q_BNLK, k_BNLK, v_BNLK = jnp.unstack(qkv.transpose(2, 0, 3, 1, 4))
    if rotation is not None:
      q_BNLK = positions.rotate(q_BNLK, rotation)
      k_BNLK = positions.rotate(k_BNLK, rotation)
    y_BNLK = _attend(q_BNLK, k_BNLK, v_BNLK, self.dtype, self.causal)
    y_BLD = y_BNLK.transpose(0, 2, 1, 3).reshape(x_BLD.shape)
    return Dense(width, self.dtype, name='out')(y_BLD)


class AttentionPool(nn.Module):
  """One learned query over all tokens, then an MLP: SigLIP's pooling."""

  heads: int
  mlp_dim: int
  dtype: jnp.dtype
  activation: str
  norm_epsilon: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    """Float32 [B, L, D] to [B, D]."""
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
  """Patches to tokens: a strided convolution, written as one product."""

  width: int
  patch_size: int
  dtype: jnp.dtype
  use_bias: bool = False

  @nn.compact
  def __call__(self, images_BHWC: jax.Array) -> jax.Array:
    """Float32 [B, H, W, 3] to [B, L, D]; what no patch fills is left out."""
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
  """A linear layer: products in `dtype`, float32 [..., features] out."""

  features: int
  dtype: jnp.dtype
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] to [..., features]."""
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
  """The MLP of a block, as submodules of the module that calls it."""
  gated = activation == 'swiglu'
  y_BLF = Dense(hidden * (1 + gated), dtype, name='mlp_in')(x_BLD)
  if gated:
    gate, y_BLF = jnp.split(y_BLF, 2, axis=-1)
    y_BLF = nn.silu(gate) * y_BLF
  else:
    y_BLF = _ACTIVATIONS[activation](y_BLF)
  return Dense(x_BLD.shape[-1], dtype, name='mlp_out')(y_BLF)


def projection(width: int, features: int, dtype: jnp.dtype) -> Dense:
  """The linear layer from pooled features to the embedding."""
  return Dense(
    features,
    dtype,
    use_bias=False,
    kernel_init=nn.initializers.normal(width**-0.5),
    name='projection',
  )


def normalise(
  images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Images uint8 [B, H, W, 3] to float32; floats are so already.

  Args:
    images: RGB.
    mean: of RGB in 0 .. 1, subtracted.
    std: of RGB in 0 .. 1, divided by.
  """
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images.astype(jnp.float32)
  mean, std = jnp.asarray(mean), jnp.asarray(std)
  scaled = images.astype(jnp.float32) / 255
  return (scaled - mean[None, None, None]) / std[None, None, None]


def norm(epsilon: float, name: str) -> nn.LayerNorm:
  """A LayerNorm in float32."""
  return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def _attend(
  q_BNLK: jax.Array,
  k_BNMK: jax.Array,
  v_BNMK: jax.Array,
  dtype: jnp.dtype,
  causal: bool = False,
) -> jax.Array:
  """Softmax attention, [B, N, L, K]; scores and softmax in float32."""
  scores = jnp.einsum(
    'BNLK,BNMK->BNLM',
    q_BNLK,
    k_BNMK,
    preferred_element_type=jnp.float32,
  )
  if causal:
    seen_LM = jnp.tri(*scores.shape[-2:], dtype=bool)
    scores = jnp.where(seen_LM[None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores * q_BNLK.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum('BNLM,BNMK->BNLK', weights.astype(dtype), v_BNMK)


def _flat_matmul(
  x: jax.Array, kernel: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """X [..., D] times kernel [D, F] with all other axes of x made one.

  The gradient of the kernel then sums over one axis, not over several, which
  XLA's CPU back end is slow at.
  """
  out = matmul.matmul(x.reshape(-1, x.shape[-1]), kernel, dtype)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])
