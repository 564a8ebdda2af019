"""One vision transformer for CLIP's, MLCD's, SigLIP's and DINOv2's, in Linen.

Shapes: B images, H W pixels, L tokens, D width, K width of a head.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mlcd_jax.models import layers
from mlcd_jax.models import positions

# Sizes of Dosovitskiy et al. (2021), Zhai et al. (2022), Alabdulmohsin et al.
# (2023, SO400M) and OpenCLIP (bigG). Nano is ours, for 28-pixel digits.
VARIANTS = {
  'Nano': dict(width=96, depth=3, heads=3, mlp_dim=384),
  'Ti': dict(width=192, depth=12, heads=3, mlp_dim=768),
  'S': dict(width=384, depth=12, heads=6, mlp_dim=1_536),
  'B': dict(width=768, depth=12, heads=12, mlp_dim=3_072),
  'L': dict(width=1_024, depth=24, heads=16, mlp_dim=4_096),
  'SO400M': dict(width=1_152, depth=27, heads=16, mlp_dim=4_304),
  'H': dict(width=1_280, depth=32, heads=16, mlp_dim=5_120),
  'g': dict(width=1_408, depth=40, heads=16, mlp_dim=6_144),
  'bigG': dict(width=1_664, depth=48, heads=16, mlp_dim=8_192),
}

# CLIP's, of RGB in 0 .. 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

POOLINGS = ('class_token', 'average', 'attention')
POSITIONS = ('learned', 'rope2d')

# What the backward pass of a block finds and what it computes anew.
REMAT = ('none', 'dots', 'full')


class ViT(nn.Module):
  """Images to tokens, pooled features and an embedding.

  Attributes:
    width: D.
    depth: number of blocks.
    heads: their number in a block.
    mlp_dim: hidden width of a block's MLP.
    patch_size: side of a patch in pixels.
    embedding_dim: width of the projected output; 0 = pooled is the output.
    pooling: 'class_token', or without one 'average' over the patches, or
      'attention' by a learned query (SigLIP).
    dtype: of the products; weights, norms and softmax stay float32.
    image_size: pixels of the side that a table of positions is for; it is
      interpolated for images of another size. 0 = the images' own.
    position: 'learned', a table; or 'rope2d', rotations of queries and keys.
    activation: one of layers.ACTIVATIONS.
    pre_norm: a norm before the blocks (CLIP).
    patch_bias: a bias after the patches' convolution.
    layer_scale: a learned factor after each branch of a block (DINOv2).
    registers: tokens after the class token that are only worked with.
    norm_epsilon: of all norms.
    antialias: of the table's interpolation.
    mean: of RGB in 0 .. 1, subtracted from uint8 images.
    std: of RGB in 0 .. 1, which they are then divided by.
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
  image_size: int = 0
  position: str = 'learned'
  activation: str = 'gelu'
  pre_norm: bool = False
  patch_bias: bool = False
  layer_scale: bool = False
  registers: int = 0
  norm_epsilon: float = 1e-5
  antialias: bool = False
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD
  remat: str = 'none'
  scan_layers: bool = False
  drop_path: float = 0.0

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
      weight_B: for ResNets; here no image depends on the others.
      drop_path_key: in training, which images skip which blocks.

    Returns:
      hidden [B, L, D] of the last block, tokens [B, L, D] after the last norm,
      pooled [B, D] and embedding [B, embedding_dim], all float32; what linear
      probes use is `pooled`.
    """
    del weight_B
    grid = tuple(side // self.patch_size for side in images.shape[1:3])
    x_BLD = layers.Patches(
      self.width, self.patch_size, self.dtype, self.patch_bias, name='patches'
    )(layers.normalise(images, self.mean, self.std))
    x_BLD = self._add_tokens(x_BLD, grid)
    if self.pre_norm:
      x_BLD = layers.norm(self.norm_epsilon, 'pre_norm')(x_BLD)
    hidden_BLD = self._blocks(x_BLD, self._rotation(grid), drop_path_key)
    x_BLD = layers.norm(self.norm_epsilon, 'post_norm')(hidden_BLD)
    pooled_BD = embedding = self._pool(x_BLD)
    if self.embedding_dim:
      project = layers.projection(self.width, self.embedding_dim, self.dtype)
      embedding = project(pooled_BD)
    return {
      'hidden': hidden_BLD,
      'tokens': x_BLD,
      'pooled': pooled_BD,
      'embedding': embedding,
    }

  @property
  def has_class_token(self) -> bool:
    """Whether a class token stands before the patches."""
    return self.pooling == 'class_token'

  def _num_positions(self, grid: tuple[int, int]) -> int:
    """Rows of the table for a grid of patches."""
    return self.has_class_token + grid[0] * grid[1]

  def _add_tokens(self, x_BLD: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Puts class token and registers before the patches; adds positions."""
    if self.has_class_token:
      token = self.param('class_token', layers.normal, (1, 1, self.width))
      x_BLD = _prepend(token, x_BLD)
    if self.position == 'learned':
      side = self.image_size // self.patch_size
      own_grid = (side, side) if side else grid
      table_1LD = self.param(
        'positions',
        layers.normal,
        (1, self._num_positions(own_grid), self.width),
      )
      table_LD = positions.interpolate(
        table_1LD[0],
        grid,
        own_grid,
        extra=self.has_class_token,
        antialias=self.antialias,
      )
      x_BLD = x_BLD + table_LD[None]
    if self.registers:
      tokens = self.param(
        'registers', layers.normal, (1, self.registers, self.width)
      )
      first = int(self.has_class_token)
      x_BLD = jnp.concatenate(
        [x_BLD[:, :first], _prepend(tokens, x_BLD[:, first:])], axis=1
      )
    return x_BLD

  def _rotation(
    self, grid: tuple[int, int]
  ) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines [L, K] of rotary positions, if there are any."""
    if self.position != 'rope2d':
      return None
    head_dim = self.width // self.heads
    angles = None
    if self.has_class_token:  # MLCD learns where the class token is.
      angles = self.param(
        'class_position', nn.initializers.normal(1.0), (1, head_dim // 2)
      )
    return positions.rotations(grid, head_dim, angles)

  def _pool(self, x_BLD: jax.Array) -> jax.Array:
    """Tokens after the last norm to [B, D]."""
    if self.pooling == 'class_token':
      return x_BLD[:, 0]
    if self.pooling == 'average':
      return x_BLD.mean(axis=1)
    return layers.AttentionPool(
      self.heads,
      self.mlp_dim,
      self.dtype,
      self.activation,
      self.norm_epsilon,
      name='pool',
    )(x_BLD)

  def _blocks(
    self,
    x_BLD: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    drop_path_key: jax.Array | None,
  ) -> jax.Array:
    """All blocks, over parameters that lie beside each other by layer."""
    block = layers.Block(
      self.heads,
      self.mlp_dim,
      self.dtype,
      self.activation,
      self.layer_scale,
      self.norm_epsilon,
      parent=None,
    )
    init = lambda key: block.init(key, x_BLD)['params']  # noqa: E731
    params = [self.param(f'block_{i:02d}', init) for i in range(self.depth)]
    weights = self._drop_path(drop_path_key, len(x_BLD))
    run = _with_remat(self.remat, functools.partial(_apply_block, block))
    if not self.scan_layers:
      for i, layer in enumerate(params):
        weight = None if weights is None else weights[i]
        x_BLD = run(x_BLD, layer, weight, rotation)
      return x_BLD
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return lax.scan(
      lambda x, layer: (run(x, *layer, rotation), None),
      x_BLD,
      (stacked, weights),
    )[0]

  def _drop_path(self, key: jax.Array | None, batch: int) -> jax.Array | None:
    """Weights of every layer's two branches, [depth, 2, B, 1, 1], mean 1."""
    if key is None or not self.drop_path:
      return None
    kept = 1 - self.drop_path * jnp.linspace(0, 1, self.depth)
    kept = kept[:, None, None, None, None]
    shape = (self.depth, 2, batch, 1, 1)
    return jax.random.bernoulli(key, kept, shape) / kept


def _prepend(tokens: jax.Array, x_BLD: jax.Array) -> jax.Array:
  """The same tokens [1, n, D] before those of every image."""
  shape = (len(x_BLD), *tokens.shape[1:])
  return jnp.concatenate([jnp.broadcast_to(tokens, shape), x_BLD], axis=1)


def _apply_block(
  block: nn.Module,
  x_BLD: jax.Array,
  params: Any,
  weights: jax.Array | None,
  rotation: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  return block.apply({'params': params}, x_BLD, weights, rotation)


def _with_remat(policy: str, f):
  """The function with less kept for its backward pass; see ViT.remat."""
  if policy == 'none':
    return f
  saved = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  return jax.checkpoint(f, policy=saved[policy])
