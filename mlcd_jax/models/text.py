"""CLIP's text tower (Radford et al. 2021) in Linen.

Shapes: B texts, L tokens, D width.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from mlcd_jax.models import layers


class TextTower(nn.Module):
  """An encoder from token ids to tokens, pooled features and an embedding.

  Attributes:
    vocab_size: the number of token ids.
    context: the most tokens of a text, and the length of the position table.
    width: D.
    depth: the number of blocks.
    heads: the number of attention heads in a block.
    mlp_dim: the hidden width of the MLPs.
    embedding_dim: the width of the projection; 0 = no projection, so that the
      embedding is the pooled features.
    dtype: the type of the operands of products. Weights, norms and softmax
      stay float32.
    end_token: the id that ends a text. Features are pooled at its first
      occurrence. -1 = at the highest id, the end token of CLIP's vocabulary.
    activation: one of layers.ACTIVATIONS.
    norm_epsilon: the epsilon of all norms.
  """

  vocab_size: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  embedding_dim: int
  dtype: jnp.dtype
  end_token: int = -1
  activation: str = 'quick_gelu'
  norm_epsilon: float = 1e-5

  @nn.compact
  def __call__(self, tokens_BL: jax.Array) -> dict[str, jax.Array]:
    """Encodes texts.

    Args:
      tokens_BL: int ids [B, L] with L at most `context`. Ids after the end of
        a text do not affect its pooled features.

    Returns:
      A dict of float32 arrays: tokens [B, L, D] after the last norm, pooled
      [B, D] and embedding [B, embedding_dim].
    """
    table_VD = self.param(
      'embedding', layers.normal, (self.vocab_size, self.width)
    )
    # 0.01 is the standard deviation in CLIP's own code.
    positions_LD = self.param(
      'positions', nn.initializers.normal(0.01), (self.context, self.width)
    )
    x_BLD = table_VD[tokens_BL] + positions_LD[None, : tokens_BL.shape[1]]
    for i in range(self.depth):
      x_BLD = layers.Block(
        self.heads,
        self.mlp_dim,
        self.dtype,
        self.activation,
        norm_epsilon=self.norm_epsilon,
        causal=True,
        name=f'block_{i:02d}',
      )(x_BLD)
    x_BLD = layers.norm(self.norm_epsilon, 'post_norm')(x_BLD)
    # argmax returns the first of equal values.
    end_B = jnp.argmax(
      tokens_BL if self.end_token < 0 else tokens_BL == self.end_token, axis=1
    )
    pooled_BD = x_BLD[jnp.arange(len(x_BLD)), end_B]
    embedding = pooled_BD
    if self.embedding_dim:
      project = layers.projection(self.width, self.embedding_dim, self.dtype)
      embedding = project(pooled_BD)
    return {'tokens': x_BLD, 'pooled': pooled_BD, 'embedding': embedding}
