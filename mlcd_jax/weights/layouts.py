"""Tables that match the parameters here with the tensors of released files.

Import and export use the same table, so that they cannot differ. A table maps
the path of a parameter, such as block_00/mlp_in/kernel, to the tensors that it
is made of, which are joined on its last axis. A row of a table is a pair of a
path and its tensors.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from mlcd_jax import models
from mlcd_jax.models import text as text_lib
from mlcd_jax.models import vit
from mlcd_jax.weights import resnets

PROJECTION = 'visual_projection.weight'
TEXT_PREFIX = 'text_model.'
TEXT_PROJECTION = 'text_projection.weight'


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor of a file, or a third of one, as a part of a parameter.

  Attributes:
    name: the name of the tensor in the file.
    kind: the order of its axes in the file: 'matrix' is [out, in],
      'convolution' is [out, in, h, w], and 'same' is the order used here.
    third: the index of the third of its first axis that is used; None = all of
      it. PyTorch's attention keeps queries, keys and values in one tensor.
  """

  name: str
  kind: str = 'same'
  third: int | None = None

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the whole tensor in the file.

    Args:
      ours: the shape of the part here.
    """
    # NumPy's transpose does the work. Booleans keep the dummy array small.
    shape = tuple(np.empty(ours, bool).transpose(self._axes(ours)).shape)
    return shape if self.third is None else (3 * shape[0], *shape[1:])

  def to_ours(self, tensor: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
    """Converts a tensor of the file to the array used here.

    Args:
      tensor: the whole tensor.
      ours: the shape of the part here.
    """
    if self.third is not None:
      tensor = np.split(tensor, 3)[self.third]
    if self.kind == 'same':
      return tensor.reshape(ours)
    return tensor.transpose(np.argsort(self._axes(ours)))

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Converts an array to the tensor of the file, the inverse of `to_ours`.

    It ignores `third`: no exported tensor is split.
    """
    return np.ascontiguousarray(array.transpose(self._axes(array.shape)))

  def _axes(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the order of axes that turns an array into the file's tensor."""
    return {'matrix': (1, 0), 'convolution': (3, 2, 0, 1)}.get(
      self.kind, tuple(range(len(ours)))
    )


def of_images(
  family: str, model: models.Encoder
) -> dict[str, tuple[Part, ...]]:
  """Returns the table of an image encoder.

  Args:
    family: clip, mlcd, siglip, dinov2, open_clip, timm or resnet.
    model: the encoder.

  Returns:
    The parts of every parameter by its path.
  """
  if family == 'resnet':
    return {
      path: (Part(name, kind),) for path, name, kind in resnets.tensors(model)
    }
  if family in _FUSED:
    return dict(_fused(_FUSED[family], model))
  table = dict(_dinov2(model) if family == 'dinov2' else _clip(family, model))
  # transformers' MLCDVisionModel has no projection.
  if model.embedding_dim and family != 'mlcd':
    table['projection/kernel'] = (Part(PROJECTION, 'matrix'),)
  return table


def _clip(family: str, model: vit.ViT) -> Iterator[tuple[str, Any]]:
  """Yields the rows for CLIP's, MLCD's and SigLIP's towers."""
  yield from _linear(
    'patches',
    'embeddings.patch_embedding',
    kind='convolution',
    bias=model.patch_bias,
  )
  if model.has_class_token:
    yield 'class_token', (Part('embeddings.class_embedding'),)
  if model.position == 'learned':
    yield 'positions', (Part('embeddings.position_embedding.weight'),)
  elif model.has_class_token:
    yield 'class_position', (Part('class_pos_emb'),)
  if model.pre_norm:
    yield from _norm('pre_norm', 'pre_layrnorm')  # Their typing error.
  yield from _norm('post_norm', 'post_layernorm')
  yield from _clip_blocks(model.depth)
  if family == 'siglip':
    yield from _siglip_head()


def of_text(model: text_lib.TextTower) -> dict[str, tuple[Part, ...]]:
  """Returns the table of CLIP's text tower; see `of_images`."""
  prefix = TEXT_PREFIX
  table = {
    'embedding': (Part(f'{prefix}embeddings.token_embedding.weight'),),
    'positions': (Part(f'{prefix}embeddings.position_embedding.weight'),),
    **dict(_norm('post_norm', f'{prefix}final_layer_norm')),
    **dict(_clip_blocks(model.depth, prefix)),
  }
  if model.embedding_dim:
    table['projection/kernel'] = (Part(TEXT_PROJECTION, 'matrix'),)
  return table


def _clip_blocks(depth: int, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the rows of the blocks of CLIP's towers, MLCD's and SigLIP's."""
  for i in range(depth):
    ours, theirs = f'block_{i:02d}', f'{prefix}encoder.layers.{i}'
    yield from _norm(f'{ours}/attention_norm', f'{theirs}.layer_norm1')
    yield from _norm(f'{ours}/mlp_norm', f'{theirs}.layer_norm2')
    attention = f'{theirs}.self_attn'
    yield from _linear(
      f'{ours}/attention/qkv', *(f'{attention}.{n}_proj' for n in 'qkv')
    )
    yield from _linear(f'{ours}/attention/out', f'{attention}.out_proj')
    yield from _linear(f'{ours}/mlp_in', f'{theirs}.mlp.fc1')
    yield from _linear(f'{ours}/mlp_out', f'{theirs}.mlp.fc2')


# The names of layouts that keep queries, keys and values in one tensor, by
# family.
_FUSED = {
  'open_clip': dict(
    patches='conv1.weight',
    class_token='class_embedding',
    positions='positional_embedding',
    pre_norm='ln_pre',
    post_norm='ln_post',
    block='transformer.resblocks',
    attention_norm='ln_1',
    qkv='attn.in_proj_',
    out='attn.out_proj',
    mlp_norm='ln_2',
    mlp_in='mlp.c_fc',
    mlp_out='mlp.c_proj',
    projection=Part('proj'),  # [in, out], as here.
  ),
  'timm': dict(
    patches='patch_embed.proj.weight',
    class_token='cls_token',
    positions='pos_embed',
    pre_norm='norm_pre',
    post_norm='norm',
    block='blocks',
    attention_norm='norm1',
    qkv='attn.qkv.',
    out='attn.proj',
    mlp_norm='norm2',
    mlp_in='mlp.fc1',
    mlp_out='mlp.fc2',
    projection=Part('head.weight', 'matrix'),
  ),
}


def _fused(names: Mapping[str, Any], model: vit.ViT):
  """Yields the rows for CLIP's tower in OpenCLIP or timm.

  Args:
    names: a value of _FUSED.
    model: the encoder.
  """
  yield 'patches/kernel', (Part(names['patches'], 'convolution'),)
  for token in ('class_token', 'positions'):
    yield token, (Part(names[token]),)
  for norm in ('pre_norm', 'post_norm'):
    yield from _norm(norm, names[norm])
  for i in range(model.depth):
    ours, theirs = f'block_{i:02d}', f'{names["block"]}.{i}'
    for norm in ('attention_norm', 'mlp_norm'):
      yield from _norm(f'{ours}/{norm}', f'{theirs}.{names[norm]}')
    packed = f'{theirs}.{names["qkv"]}'
    yield f'{ours}/attention/qkv/kernel', (Part(f'{packed}weight', 'matrix'),)
    yield f'{ours}/attention/qkv/bias', (Part(f'{packed}bias'),)
    yield from _linear(f'{ours}/attention/out', f'{theirs}.{names["out"]}')
    for layer in ('mlp_in', 'mlp_out'):
      yield from _linear(f'{ours}/{layer}', f'{theirs}.{names[layer]}')
  if model.embedding_dim:
    yield 'projection/kernel', (names['projection'],)


def _siglip_head() -> Iterator[tuple[str, Any]]:
  """Yields the rows of SigLIP's attention pooling."""
  yield 'pool/probe', (Part('head.probe'),)
  # A torch.nn.MultiheadAttention: the thirds are query, key and value.
  packed = 'head.attention.in_proj'
  for name, thirds in (('query', (0,)), ('key_value', (1, 2))):
    yield (
      f'pool/{name}/kernel',
      tuple(Part(f'{packed}_weight', 'matrix', third) for third in thirds),
    )
    yield (
      f'pool/{name}/bias',
      tuple(Part(f'{packed}_bias', third=third) for third in thirds),
    )
  yield from _linear('pool/out', 'head.attention.out_proj')
  yield from _norm('pool/norm', 'head.layernorm')
  yield from _linear('pool/mlp_in', 'head.mlp.fc1')
  yield from _linear('pool/mlp_out', 'head.mlp.fc2')


def _dinov2(model: vit.ViT) -> Iterator[tuple[str, Any]]:
  """Yields the rows for DINOv2's towers, with registers or without."""
  yield from _linear(
    'patches', 'embeddings.patch_embeddings.projection', kind='convolution'
  )
  yield 'class_token', (Part('embeddings.cls_token'),)
  yield 'positions', (Part('embeddings.position_embeddings'),)
  if model.registers:
    yield 'registers', (Part('embeddings.register_tokens'),)
  yield from _norm('post_norm', 'layernorm')
  # The layers of transformers' Dinov2SwiGLUFFN have other names.
  gated = model.activation == 'swiglu'
  mlp = ('weights_in', 'weights_out') if gated else ('fc1', 'fc2')
  for i in range(model.depth):
    ours, theirs = f'block_{i:02d}', f'encoder.layer.{i}'
    yield from _norm(f'{ours}/attention_norm', f'{theirs}.norm1')
    yield from _norm(f'{ours}/mlp_norm', f'{theirs}.norm2')
    attention = f'{theirs}.attention'
    yield from _linear(
      f'{ours}/attention/qkv',
      *(f'{attention}.attention.{n}' for n in ('query', 'key', 'value')),
    )
    yield from _linear(f'{ours}/attention/out', f'{attention}.output.dense')
    yield from _linear(f'{ours}/mlp_in', f'{theirs}.mlp.{mlp[0]}')
    yield from _linear(f'{ours}/mlp_out', f'{theirs}.mlp.{mlp[1]}')
    for name, n in (('attention', 1), ('mlp', 2)):
      scale = f'{theirs}.layer_scale{n}.lambda1'
      yield f'{ours}/{name}_scale', (Part(scale),)


def _linear(ours: str, *theirs: str, kind: str = 'matrix', bias: bool = True):
  """Yields the rows of a linear layer, or of a convolution.

  Args:
    ours: the path of the layer here.
    *theirs: the names of its layers in the file, joined here on the last axis.
    kind: the `kind` of the weights; see `Part`.
    bias: the layer has a bias.
  """
  yield f'{ours}/kernel', tuple(Part(f'{t}.weight', kind) for t in theirs)
  if bias:
    yield f'{ours}/bias', tuple(Part(f'{t}.bias') for t in theirs)


def _norm(ours: str, theirs: str):
  """Yields the rows of a LayerNorm, from its path here and name in the file."""
  yield f'{ours}/scale', (Part(f'{theirs}.weight'),)
  yield f'{ours}/bias', (Part(f'{theirs}.bias'),)
