"""Which tensor of `transformers` is which parameter, both ways.

One table says it for all families, so that import and export cannot differ.
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
  """A tensor, or a third of one, that is a parameter or a part of one.

  Attributes:
    name: in the file.
    kind: 'same', 'matrix' [out, in], or 'convolution' [out, in, h, w].
    third: which third of its first axis; all of it where None.
  """

  name: str
  kind: str = 'same'
  third: int | None = None

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of what has this shape here."""
    shape = tuple(np.empty(ours, bool).transpose(self._axes(ours)).shape)
    return shape if self.third is None else (3 * shape[0], *shape[1:])

  def to_ours(self, tensor: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file as it is here."""
    if self.third is not None:
      tensor = np.split(tensor, 3)[self.third]
    if self.kind == 'same':
      return tensor.reshape(ours)
    return tensor.transpose(np.argsort(self._axes(ours)))

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """The reverse of `to_ours`, for whole tensors."""
    return np.ascontiguousarray(array.transpose(self._axes(array.shape)))

  def _axes(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    return {'matrix': (1, 0), 'convolution': (3, 2, 0, 1)}.get(
      self.kind, tuple(range(len(ours)))
    )


def of_images(
  family: str, model: models.Encoder
) -> dict[str, tuple[Part, ...]]:
  """Every parameter's path and the tensors it is made of."""
  if family == 'resnet':
    return {
      path: (Part(name, kind),) for path, name, kind in resnets.tensors(model)
    }
  if family in _FUSED:
    return dict(_fused(_FUSED[family], model))
  table = dict(_dinov2(model) if family == 'dinov2' else _clip(family, model))
  if model.embedding_dim and family != 'mlcd':
    table['projection/kernel'] = (Part(PROJECTION, 'matrix'),)
  return table


def _clip(family: str, model: vit.ViT) -> Iterator[tuple[str, Any]]:
  """The names of CLIP's, MLCD's and SigLIP's towers."""
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
  """The same of CLIP's text tower."""
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


# Layouts that keep queries, keys and values in one tensor.
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
    projection=Part('proj'),
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
  """The names of CLIP's tower in OpenCLIP and in timm."""
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
  yield 'pool/probe', (Part('head.probe'),)
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
  yield from _linear(
    'patches', 'embeddings.patch_embeddings.projection', kind='convolution'
  )
  yield 'class_token', (Part('embeddings.cls_token'),)
  yield 'positions', (Part('embeddings.position_embeddings'),)
  if model.registers:
    yield 'registers', (Part('embeddings.register_tokens'),)
  yield from _norm('post_norm', 'layernorm')
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
  yield f'{ours}/kernel', tuple(Part(f'{t}.weight', kind) for t in theirs)
  if bias:
    yield f'{ours}/bias', tuple(Part(f'{t}.bias') for t in theirs)


def _norm(ours: str, theirs: str):
  yield f'{ours}/scale', (Part(f'{theirs}.weight'),)
  yield f'{ours}/bias', (Part(f'{theirs}.bias'),)
