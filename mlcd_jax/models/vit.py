"""A vision transformer as CLIP's, in Linen.

Shapes: B images, H W pixels, L tokens, D width, N heads, K width of a head.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mlcd_jax import products

# Sizes of Dosovitskiy et al. (2021), Zhai et al. (2022) and, for bigG,
# OpenCLIP. Nano is ours, for 28-pixel digits.
VARIANTS = {
  'Nano': dict(width=96, depth=3, heads=3, mlp_dim=384),
  'Ti': dict(width=192, depth=12, heads=3, mlp_dim=768),
  'S': dict(width=384, depth=12, heads=6, mlp_dim=1_536),
  'B': dict(width=768, depth=12, heads=12, mlp_dim=3_072),
  'L': dict(width=1_024, depth=24, heads=16, mlp_dim=4_096),
  'H': dict(width=1_280, depth=32, heads=16, mlp_dim=5_120),
  'g': dict(width=1_408, depth=40, heads=16, mlp_dim=6_144),
  'bigG': dict(width=1_664, depth=48, heads=16, mlp_dim=8_192),
}

# CLIP's, of RGB in 0 .. 1.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

# What the backward pass of a block finds and what it computes anew.
REMAT = ('none', 'dots', 'full')

_normal = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
  """Images to tokens, pooled features and an embedding.

  Attributes:
    width: D.
    depth: number of blocks.
    heads: N.
    mlp_dim: hidden width of a block's MLP.
    patch_size: side of a patch in pixels.
    embedding_dim: width of the projected output.
    pooling: 'class_token', or 'average' over the patches without one.
    dtype: of the products; weights, norms and softmax stay float32.
    remat: one of REMAT: keep everything a block's backward pass needs, the
      results of its products, or only its input.
    scan_layers: compile one block and loop over it. The parameters and the
      numbers are the same.
    drop_path: chance that a block of the last layer is skipped in training,
      falling linearly to 0 at the first.
  """

  width: int
  depth: int
  heads: int
  mlp_dim: int
  patch_size: int
  embedding_dim: int
  pooling: str
  dtype: jnp.dtype
  remat: str = 'none'
  scan_layers: bool = False
  drop_path: float = 0.0

  @nn.compact
  def __call__(
    self, images: jax.Array, *, drop_path_key: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """Encodes images.

    Args:
      images: uint8 [B, H, W, 3].
      drop_path_key: in training, which images skip which blocks.

    Returns:
      tokens [B, L, D] after the last norm, pooled [B, D] and embedding
      [B, embedding_dim], all float32; what linear probes use is `pooled`.
    """
    x_BLD = _Patches(self.width, self.patch_size, self.dtype, name='patches')(
      _normalise(images)
    )
    if self.pooling == 'class_token':
      token = self.param('class_token', _normal, (1, 1, self.width))
      token = jnp.broadcast_to(token, (len(x_BLD), 1, self.width))
      x_BLD = jnp.concatenate([token, x_BLD], axis=1)
    positions = self.param(
      'positions', _normal, (1, x_BLD.shape[1], self.width)
    )
    x_BLD = x_BLD + positions
    if self.pooling == 'class_token':  # CLIP's extra norm.
      x_BLD = _norm('pre_norm')(x_BLD)
    x_BLD = self._blocks(x_BLD, drop_path_key)
    x_BLD = _norm('post_norm')(x_BLD)
    if self.pooling == 'class_token':
      pooled_BD = x_BLD[:, 0]
    else:
      pooled_BD = x_BLD.mean(axis=1)
    embedding = _Dense(
      self.embedding_dim,
      self.dtype,
      use_bias=False,
      kernel_init=nn.initializers.normal(self.width**-0.5),
      name='projection',
    )(pooled_BD)
    return {'tokens': x_BLD, 'pooled': pooled_BD, 'embedding': embedding}

  def _blocks(
    self, x_BLD: jax.Array, drop_path_key: jax.Array | None
  ) -> jax.Array:
    """All blocks, over parameters that lie beside each other by layer."""
    block = Block(self.heads, self.mlp_dim, self.dtype, parent=None)
    init = lambda key: block.init(key, x_BLD)['params']  # noqa: E731
    layers = [self.param(f'block_{i:02d}', init) for i in range(self.depth)]
    weights = self._drop_path(drop_path_key, len(x_BLD))
    run = _with_remat(self.remat, functools.partial(_apply_block, block))
    if not self.scan_layers:
      for i, params in enumerate(layers):
        x_BLD = run(x_BLD, params, None if weights is None else weights[i])
      return x_BLD
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return lax.scan(
      lambda x, layer: (run(x, *layer), None), x_BLD, (stacked, weights)
    )[0]

  def _drop_path(self, key: jax.Array | None, batch: int) -> jax.Array | None:
    """Weights of every layer's two branches, [depth, 2, B, 1, 1], mean 1."""
    if key is None or not self.drop_path:
      return None
    kept = 1 - self.drop_path * jnp.linspace(0, 1, self.depth)
    kept = kept[:, None, None, None, None]
    shape = (self.depth, 2, batch, 1, 1)
    return jax.random.bernoulli(key, kept, shape) / kept


def _apply_block(
  block: nn.Module, x_BLD: jax.Array, params: Any, weights: jax.Array | None
) -> jax.Array:
  return block.apply({'params': params}, x_BLD, weights)


def _with_remat(policy: str, f):
  """The function with less kept for its backward pass; see ViT.remat."""
  if policy == 'none':
    return f
  saved = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  return jax.checkpoint(f, policy=saved[policy])


class Block(nn.Module):
  """Attention and MLP, each after a norm and beside a skip connection."""

  heads: int
  mlp_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x_BLD: jax.Array, weights: jax.Array | None = None
  ) -> jax.Array:
    """Float32 [B, L, D] to the same; weights [2, B, 1, 1] of the branches."""
    y_BLD = _norm('attention_norm')(x_BLD)
    y_BLD = _Attention(self.heads, self.dtype, name='attention')(y_BLD)
    x_BLD = x_BLD + (y_BLD if weights is None else weights[0] * y_BLD)
    y_BLD = _norm('mlp_norm')(x_BLD)
    y_BLF = _Dense(self.mlp_dim, self.dtype, name='mlp_in')(y_BLD)
    y_BLF = nn.gelu(y_BLF, approximate=False)
    y_BLD = _Dense(x_BLD.shape[-1], self.dtype, name='mlp_out')(y_BLF)
    return x_BLD + (y_BLD if weights is None else weights[1] * y_BLD)


class _Attention(nn.Module):
  """Multi-head self-attention."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    width = x_BLD.shape[-1]
    head_dim = width // self.heads
    qkv = _Dense(3 * width, self.dtype, name='qkv')(x_BLD).astype(self.dtype)
    qkv = qkv.reshape(*x_BLD.shape[:2], 3, self.heads, head_dim)
    # Heads before tokens: products then run over the last two axes.
    q_BNLK, k_BNLK, v_BNLK = jnp.unstack(qkv.transpose(2, 0, 3, 1, 4))
    scores = jnp.einsum(
      'BNLK,BNMK->BNLM',
      q_BNLK,
      k_BNLK,
      preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1)
    y_BNLK = jnp.einsum('BNLM,BNMK->BNLK', weights.astype(self.dtype), v_BNLK)
    y_BLD = y_BNLK.transpose(0, 2, 1, 3).reshape(x_BLD.shape)
    return _Dense(width, self.dtype, name='out')(y_BLD)


class _Patches(nn.Module):
  """Patches to tokens: a strided convolution, written as one product."""

  width: int
  patch_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = images_BHWC.shape
    p = self.patch_size
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (p, p, channels, self.width)
    )
    rows, columns = height // p, width // p
    x = images_BHWC.reshape(batch, rows, p, columns, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    return _flat_matmul(x, kernel.reshape(-1, self.width), self.dtype)


class _Dense(nn.Module):
  """A linear layer: products in `dtype`, float32 [..., features] out."""

  features: int
  dtype: jnp.dtype
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = _normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      'kernel', self.kernel_init, (x.shape[-1], self.features)
    )
    y = _flat_matmul(x, kernel, self.dtype)
    if not self.use_bias:
      return y
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _normalise(images: jax.Array) -> jax.Array:
  """uint8 to float32 with CLIP's mean and deviation."""
  mean, std = jnp.asarray(_MEAN), jnp.asarray(_STD)
  scaled = images.astype(jnp.float32) / 255
  return (scaled - mean[None, None, None]) / std[None, None, None]


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)


def _flat_matmul(
  x: jax.Array, kernel: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """X [..., D] times kernel [D, F] with all other axes of x made one.

  The gradient of the kernel then sums over one axis, not over several, which
  XLA's CPU back end is slow at.
  """
  out = products.matmul(x.reshape(-1, x.shape[-1]), kernel, dtype)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])
