"""Which tensor of `transformers` is which parameter, both ways.

One table says it for all families, so that import and export cannot differ.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax.huggingface import resnets
from mlcd_jax.models import text as text_lib
from mlcd_jax.models import vit

PROJECTION = 'visual_projection.weight'
TEXT_PROJECTION = 'text_projection.weight'

# Prefixes of the tower inside of larger models.
_PREFIXES = ('vision_model.', 'dinov2.', 'dinov2_with_registers.', 'visual.')
OPEN_CLIP_PREFIX = _PREFIXES[-1]
# What other parts of those models are called, and what is no weight.
_TEXT = ('text_model.', 'text_projection.')
_OTHERS = (
  *_TEXT,
  'logit_scale',
  'logit_bias',
  'classifier.',
  'embeddings.mask_token',
)
_NO_WEIGHTS = ('position_ids', 'inv_freq')
# What weights are stored as, in safetensors' names.
_TYPES = ('F32', 'BF16', 'F16', 'F64')

# Tensors in messages before "and N more".
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class _Part:
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


def layout(family: str, model: vit.ViT) -> dict[str, tuple[_Part, ...]]:
  """Every parameter's path and the tensors it is made of."""
  if family == 'resnet':
    return {
      path: (_Part(name, kind),) for path, name, kind in resnets.tensors(model)
    }
  if family in _FUSED:
    return dict(_fused(_FUSED[family], model))
  table = dict(_dinov2(model) if family == 'dinov2' else _clip(family, model))
  if model.embedding_dim and family != 'mlcd':
    table['projection/kernel'] = (_Part(PROJECTION, 'matrix'),)
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
    yield 'class_token', (_Part('embeddings.class_embedding'),)
  if model.position == 'learned':
    yield 'positions', (_Part('embeddings.position_embedding.weight'),)
  elif model.has_class_token:
    yield 'class_position', (_Part('class_pos_emb'),)
  if model.pre_norm:
    yield from _norm('pre_norm', 'pre_layrnorm')  # Their typing error.
  yield from _norm('post_norm', 'post_layernorm')
  yield from _clip_blocks(model.depth)
  if family == 'siglip':
    yield from _siglip_head()


def text_layout(model: text_lib.TextTower) -> dict[str, tuple[_Part, ...]]:
  """The same of CLIP's text tower."""
  prefix = _TEXT[0]
  table = {
    'embedding': (_Part(f'{prefix}embeddings.token_embedding.weight'),),
    'positions': (_Part(f'{prefix}embeddings.position_embedding.weight'),),
    **dict(_norm('post_norm', f'{prefix}final_layer_norm')),
    **dict(_clip_blocks(model.depth, prefix)),
  }
  if model.embedding_dim:
    table['projection/kernel'] = (_Part(TEXT_PROJECTION, 'matrix'),)
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
    projection=_Part('proj'),
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
    projection=_Part('head.weight', 'matrix'),
  ),
}


def _fused(names: Mapping[str, Any], model: vit.ViT):
  """The names of CLIP's tower in OpenCLIP and in timm."""
  yield 'patches/kernel', (_Part(names['patches'], 'convolution'),)
  for token in ('class_token', 'positions'):
    yield token, (_Part(names[token]),)
  for norm in ('pre_norm', 'post_norm'):
    yield from _norm(norm, names[norm])
  for i in range(model.depth):
    ours, theirs = f'block_{i:02d}', f'{names["block"]}.{i}'
    for norm in ('attention_norm', 'mlp_norm'):
      yield from _norm(f'{ours}/{norm}', f'{theirs}.{names[norm]}')
    packed = f'{theirs}.{names["qkv"]}'
    yield f'{ours}/attention/qkv/kernel', (_Part(f'{packed}weight', 'matrix'),)
    yield f'{ours}/attention/qkv/bias', (_Part(f'{packed}bias'),)
    yield from _linear(f'{ours}/attention/out', f'{theirs}.{names["out"]}')
    for layer in ('mlp_in', 'mlp_out'):
      yield from _linear(f'{ours}/{layer}', f'{theirs}.{names[layer]}')
  if model.embedding_dim:
    yield 'projection/kernel', (names['projection'],)


def _siglip_head() -> Iterator[tuple[str, Any]]:
  yield 'pool/probe', (_Part('head.probe'),)
  packed = 'head.attention.in_proj'
  for name, thirds in (('query', (0,)), ('key_value', (1, 2))):
    yield (
      f'pool/{name}/kernel',
      tuple(_Part(f'{packed}_weight', 'matrix', third) for third in thirds),
    )
    yield (
      f'pool/{name}/bias',
      tuple(_Part(f'{packed}_bias', third=third) for third in thirds),
    )
  yield from _linear('pool/out', 'head.attention.out_proj')
  yield from _norm('pool/norm', 'head.layernorm')
  yield from _linear('pool/mlp_in', 'head.mlp.fc1')
  yield from _linear('pool/mlp_out', 'head.mlp.fc2')


def _dinov2(model: vit.ViT) -> Iterator[tuple[str, Any]]:
  yield from _linear(
    'patches', 'embeddings.patch_embeddings.projection', kind='convolution'
  )
  yield 'class_token', (_Part('embeddings.cls_token'),)
  yield 'positions', (_Part('embeddings.position_embeddings'),)
  if model.registers:
    yield 'registers', (_Part('embeddings.register_tokens'),)
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
      yield f'{ours}/{name}_scale', (_Part(scale),)


def _linear(ours: str, *theirs: str, kind: str = 'matrix', bias: bool = True):
  yield f'{ours}/kernel', tuple(_Part(f'{t}.weight', kind) for t in theirs)
  if bias:
    yield f'{ours}/bias', tuple(_Part(f'{t}.bias') for t in theirs)


def _norm(ours: str, theirs: str):
  yield f'{ours}/scale', (_Part(f'{theirs}.weight'),)
  yield f'{ours}/bias', (_Part(f'{theirs}.bias'),)


class Reader:
  """One tower's tensors in a folder's safetensors files, one at a time."""

  def __init__(
    self, folder: pathlib.Path, *, text: bool = False, prefix: str = ''
  ):
    """Reads what is in the files.

    Args:
      folder: of the checkpoint.
      text: CLIP's text tower instead of the vision tower.
      prefix: of the tower's names, where others may not be looked at.

    Raises:
      UserError: there are none, or one is missing or damaged.
    """
    self.paths = safetensors_files(folder)
    self._text = text
    self._where, self._shapes = {}, {}
    for path in self.paths:
      try:
        with safetensors.safe_open(path, framework='flax') as file:
          for stored in file.keys():
            if not stored.startswith(prefix):
              continue
            name, header = _canonical(stored), file.get_slice(stored)
            self._where[name] = path, stored
            self._shapes[name] = tuple(header.get_shape())
            self._check_type(path, stored, header.get_dtype())
      except (OSError, safetensors.SafetensorError) as e:
        raise errors.UserError(
          f'{path}: cannot be read as safetensors ({e}); get it again'
        ) from e

  def names(self) -> set[str]:
    """Names of the tower's tensors, a vision tower's without prefixes."""
    return {
      name
      for name in self._where
      if not name.endswith(_NO_WEIGHTS)
      and (
        name.startswith(_TEXT) if self._text else not name.startswith(_OTHERS)
      )
    }

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape without reading it."""
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as float32."""
    path, stored = self._where[name]
    # Opened anew: a file that stays open stays mapped, page by page as it is
    # read, and in the end is in memory a second time.
    with safetensors.safe_open(path, framework='flax') as file:
      tensor = file.get_tensor(stored)
    return np.asarray(tensor).astype(np.float32, copy=False)

  def _check_type(self, path: pathlib.Path, name: str, dtype: str) -> None:
    """Raises UserError for a weight that is no plain float."""
    if dtype not in _TYPES and not name.endswith(_NO_WEIGHTS):
      raise errors.UserError(
        f'{path}: {name} is of type {dtype}, which is not supported; only '
        + ', '.join(_TYPES)
      )


def read(
  reader: Reader,
  table: Mapping[str, tuple[_Part, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Reads all parameters as a nested dict; see `stream`."""
  return nested(stream(reader, table, shapes, folder))


def nested(parameters: Iterable[tuple[str, np.ndarray]]) -> dict[str, Any]:
  """Puts parameters by path on the device, in the dicts that Linen takes."""
  params = {path: jnp.asarray(array) for path, array in parameters}
  return flax.traverse_util.unflatten_dict(params, sep='/')


def stream(
  reader: Reader,
  table: Mapping[str, tuple[_Part, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  folder: pathlib.Path,
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads the parameters one at a time.

  Args:
    reader: of the folder.
    table: see `layout`.
    shapes: of every parameter, by path.
    folder: named in errors.

  Returns:
    Paths and float32 arrays; a block's come one after the other.

  Raises:
    UserError: lists tensors that are missing, extra or misshapen.
  """
  _check(reader, table, shapes, folder)

  def parameter(path, parts):
    ours = _part_shape(shapes[path], len(parts))
    array = np.empty(shapes[path], np.float32)
    for i, part in enumerate(parts):
      columns = slice(i * ours[-1], (i + 1) * ours[-1])
      array[..., columns] = part.to_ours(reader.read(part.name), ours)
    return array

  return ((path, parameter(path, parts)) for path, parts in table.items())


def write(
  family: str,
  table: Mapping[str, tuple[_Part, ...]],
  params: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """The reverse of `read`: tensors by name, for what can be exported."""
  prefixes = {'open_clip': OPEN_CLIP_PREFIX, 'timm': '', 'resnet': ''}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  tensors = {}
  for path, parts in table.items():
    array = np.asarray(jax.device_get(flat[path]), np.float32)
    if path in ('class_token', 'positions') and family != 'timm':
      array = array.reshape(array.shape[-2:])  # [L, D].
      array = array[0] if path == 'class_token' else array
    for part, piece in zip(parts, np.split(array, len(parts), axis=-1)):
      prefix = prefixes.get(family, _PREFIXES[0])
      prefix = '' if part.name == PROJECTION else prefix
      tensors[prefix + part.name] = part.to_theirs(piece)
  if family == 'resnet':
    tensors |= resnets.counters(tensors)
  if family == 'timm' and 'projection/kernel' in table:
    # Its heads have a bias.
    tensors['head.bias'] = np.zeros(flat['projection/kernel'].shape[1], 'f4')
  return tensors


def _check(reader, table, shapes, folder):
  """Raises UserError unless the tensors are those of the table."""
  wanted = {}
  for path, parts in table.items():
    for part in parts:
      ours = _part_shape(shapes[path], len(parts))
      wanted[part.name] = part.shape(ours)
  found = reader.names()
  wrong = [
    f'{name} {list(reader.shape(name))} instead of {list(shape)}'
    for name, shape in wanted.items()
    if name in found and _bare(reader.shape(name)) != _bare(shape)
  ]
  said = [
    f'{what}: {_listed(names)}'
    for what, names in (
      ('missing', sorted(set(wanted) - found)),
      ('extra', sorted(found - set(wanted))),
      ('misshapen', wrong),
    )
    if names
  ]
  if said:
    raise errors.UserError(
      f'{folder}: the tensors are not those its config.json describes; '
      + '; '.join(said)
    )


def _listed(names: list[str]) -> str:
  more = len(names) - _SHOWN
  return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
  return (*shape[:-1], shape[-1] // parts)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Without leading ones, which tokens and positions have or have not."""
  while len(shape) > 1 and shape[0] == 1:
    shape = shape[1:]
  return tuple(shape)


def _canonical(name: str) -> str:
  """A tensor's name without prefix, as transformers 5 has it."""
  for prefix in _PREFIXES:
    name = name.removeprefix(prefix)
  return name.replace('pre_layernorm.', 'pre_layrnorm.')


def safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files with a folder's weights: one, or those an index names.

  Raises:
    UserError: there are none, or one is missing.
  """
  whole = folder / 'model.safetensors'
  index = folder / 'model.safetensors.index.json'
  if whole.is_file():
    return [whole]
  if index.is_file():
    content = files.read_json(index)
    try:
      names = sorted(set(content['weight_map'].values()))
      paths = [folder / pathlib.Path(name).name for name in names]
    except (AttributeError, KeyError, TypeError) as e:
      raise errors.UserError(
        f'{index}: not as transformers writes it; get it again'
      ) from e
  else:
    paths = sorted(folder.glob('*.safetensors'))
  if not paths:
    raise errors.UserError(
      f'{folder}: no *.safetensors; pickled weights are not read, save them '
      'anew with safe_serialization=True'
    )
  for path in paths:
    if not path.is_file():
      raise errors.UserError(
        f'{path}: missing, but {index.name} names it; get it again'
      )
  return paths
