"""A vision transformer for CLIP, MLCD, SigLIP and DINOv2 weights, in Linen.

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

# The sizes are those of Dosovitskiy et al. (2021), Zhai et al. (2022),
# Alabdulmohsin et al. (2023, SO400M) and OpenCLIP (bigG). Nano is ours, for
# digits at 28 pixels.
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

# The RGB mean and standard deviation of CLIP's images, for values in 0 .. 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Policies of rematerialisation, see ViT.remat.
REMAT = ('none', 'dots', 'full')


class ViT(nn.Module):
  """An encoder from images to tokens, pooled features and an embedding.

  Attributes:
    width: D.
    depth: the number of blocks.
    heads: the number of attention heads in a block.
    mlp_dim: the hidden width of the MLPs.
    patch_size: the side of a patch in pixels.
    embedding_dim: the width of the projection; 0 = no projection, so that the
      embedding is the pooled features.
    pooling: 'class_token' adds a class token and uses it; 'average' averages
      all tokens; 'attention' uses a learned query (SigLIP).
    dtype: the type of the operands of products. Weights, norms and softmax
      stay float32.
    image_size: the side in pixels for which the position table is made. The
      table is interpolated for other sizes. 0 = the size of the images that
      the parameters are initialised with.
    position: 'learned' adds a table of positions; 'rope2d' rotates queries and
      keys.
    activation: one of layers.ACTIVATIONS.
    pre_norm: apply a norm before the blocks (CLIP).
    patch_bias: add a bias to the patch embedding.
    layer_scale: multiply each branch of a block by a learned vector (DINOv2).
    registers: the number of learned tokens, without positions, between the
      class token and the patches (DINOv2).
    norm_epsilon: the epsilon of all norms.
    antialias: interpolate the position table with antialiasing.
    mean: the RGB mean to subtract from uint8 images, for values in 0 .. 1.
    std: the RGB standard deviation to divide by, for values in 0 .. 1.
    remat: one of REMAT. The backward pass keeps all it needs ('none'), the
      results of products with weights ('dots'), or only the input of each
      block ('full').
    scan_layers: compile one block and loop over it. Parameters and results do
      not change.
    drop_path: the probability that a branch of the last block is dropped in
      training. It falls linearly to 0 at the first block.
    batch_sharding: how the tokens between blocks lie on the devices; None
      leaves it to the compiler. With sharded weights the compiler would gather
      the tokens, which are larger.
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
  batch_sharding: jax.sharding.Sharding | None = None

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
      weight_B: not used; ResNets have the same interface.
      drop_path_key: in training, the key that draws the dropped branches.

    Returns:
      A dict of float32 arrays: hidden [B, L, D] after the last block, tokens
      [B, L, D] after the last norm, pooled [B, D], which linear probes use,
      and embedding [B, embedding_dim].
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
    """Returns whether a class token comes before the patches."""
    return self.pooling == 'class_token'

  def _num_positions(self, grid: tuple[int, int]) -> int:
    """Returns the number of rows of the position table for a grid."""
    return self.has_class_token + grid[0] * grid[1]

  def _add_tokens(self, x_BLD: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Prepends the class token, adds positions and inserts the registers."""
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
    # Registers come after the positions were added, since they have none.
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
    """Returns cosines and sines [L, K] of rotary positions, None without."""
    if self.position != 'rope2d':
      return None
    head_dim = self.width // self.heads
    angles = None
    if self.has_class_token:  # MLCD learns the angles of its class token.
      angles = self.param(
        'class_position', nn.initializers.normal(1.0), (1, head_dim // 2)
      )
    return positions.rotations(grid, head_dim, angles)

  def _pool(self, x_BLD: jax.Array) -> jax.Array:
    """Pools the tokens after the last norm to [B, D]."""
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
    """Applies all blocks; each has its own parameters, named by its index.

    Args:
      x_BLD: the tokens.
      rotation: cosines and sines [L, K] of rotary positions, or None.
      drop_path_key: the key that draws the dropped branches, or None.
    """
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
    x_BLD = self._pinned(x_BLD)
    if not self.scan_layers:
      for i, layer in enumerate(params):
        weight = None if weights is None else weights[i]
        x_BLD = self._pinned(run(x_BLD, layer, weight, rotation))
      return x_BLD
    # Stacked here, so that checkpoints are the same with and without a scan.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return lax.scan(
      lambda x, layer: (self._pinned(run(x, *layer, rotation)), None),
      x_BLD,
      (stacked, weights),
    )[0]

  def _pinned(self, x_BLD: jax.Array) -> jax.Array:
    """Fixes how the tokens, and in the backward pass their gradients, lie."""
    if self.batch_sharding is None:
      return x_BLD
    return lax.with_sharding_constraint(x_BLD, self.batch_sharding)

  def _drop_path(self, key: jax.Array | None, batch: int) -> jax.Array | None:
    """Draws factors [depth, 2, B, 1, 1] of both branches of every block.

    A dropped branch has factor 0. The others are scaled so that the expected
    factor is 1.
    """
    if key is None or not self.drop_path:
      return None
    kept = 1 - self.drop_path * jnp.linspace(0, 1, self.depth)
    kept = kept[:, None, None, None, None]
    shape = (self.depth, 2, batch, 1, 1)
    return jax.random.bernoulli(key, kept, shape) / kept


def _prepend(tokens: jax.Array, x_BLD: jax.Array) -> jax.Array:
  """Prepends the same tokens [1, n, D] to those of every image."""
  shape = (len(x_BLD), *tokens.shape[1:])
  return jnp.concatenate([jnp.broadcast_to(tokens, shape), x_BLD], axis=1)


def _apply_block(
  block: nn.Module,
  x_BLD: jax.Array,
  params: Any,
  weights: jax.Array | None,
  rotation: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """Applies a block with the given parameters."""
  return block.apply({'params': params}, x_BLD, weights, rotation)


def _with_remat(policy: str, f):
  """Wraps f so that its backward pass keeps less; see ViT.remat."""
  if policy == 'none':
    return f
  saved = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  return jax.checkpoint(f, policy=saved[policy])
