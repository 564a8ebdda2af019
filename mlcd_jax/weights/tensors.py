"""Reads and writes the safetensors files of one tower.

The tables of `layouts` say which tensors make up which parameter.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import layouts
from mlcd_jax.weights import open_clip as open_clip_lib
from mlcd_jax.weights import resnets

# The prefixes that a vision tower's tensors have inside larger models.
_PREFIXES = ('vision_model.', 'dinov2.', 'dinov2_with_registers.', 'visual.')
OPEN_CLIP_PREFIX = _PREFIXES[-1]
# Prefixes of CLIP's text tower and its projection.
_TEXT = (layouts.TEXT_PREFIX, 'text_projection.')
# Prefixes of tensors in the same files that a vision tower does not use:
# `mask_token` only serves the pretraining of DINOv2.
_OTHERS = (
  *_TEXT,
  'logit_scale',
  'logit_bias',
  'classifier.',
  'embeddings.mask_token',
)
# Endings of buffers that some versions of transformers save. They hold no
# weights and are computed anew here.
_NO_WEIGHTS = ('position_ids', 'inv_freq')
# The types of weights that can be read, in safetensors' names. Integers and
# 8-bit floats are quantised weights, which need scales to be read.
_TYPES = ('F32', 'BF16', 'F16', 'F64')

# The number of tensors that a message names before "and N more".
_SHOWN = 20


class Reader:
  """A reader of one tower's tensors in the safetensors files of a folder.

  Attributes:
    paths: the files.
  """

  def __init__(
    self, folder: pathlib.Path, *, text: bool = False, prefix: str = ''
  ):
    """Reads names, shapes and types from the headers of the files.

    Args:
      folder: the folder of the checkpoint.
      text: read CLIP's text tower instead of the vision tower.
      prefix: the prefix of the tensors to read, others are ignored; '' = read
        all.

    Raises:
      UserError: there are no files, or one is missing or damaged, or a tensor
        has an unsupported type.
    """
    self.paths = safetensors_files(folder, open_clip=prefix == OPEN_CLIP_PREFIX)
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
    """Returns the names of the tower's tensors.

    A vision tower's names have no prefix; a text tower's keep theirs.
    """
    return {
      name
      for name in self._where
      if not name.endswith(_NO_WEIGHTS)
      and (
        name.startswith(_TEXT) if self._text else not name.startswith(_OTHERS)
      )
    }

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor without reading its values."""
    return self._shapes[name]

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as float32."""
    path, stored = self._where[name]
    # Reopened for every tensor: an open file stays mapped, and its pages would
    # stay in memory next to the arrays copied from them. `flax` is chosen
    # because NumPy has no bfloat16.
    with safetensors.safe_open(path, framework='flax') as file:
      tensor = file.get_tensor(stored)
    return np.asarray(tensor).astype(np.float32, copy=False)

  def _check_type(self, path: pathlib.Path, name: str, dtype: str) -> None:
    """Raises UserError if a weight has none of the types in _TYPES."""
    if dtype not in _TYPES and not name.endswith(_NO_WEIGHTS):
      raise errors.UserError(
        f'{path}: {name} is of type {dtype}, which is not supported; only '
        + ', '.join(_TYPES)
      )


def read(
  reader: Reader,
  table: Mapping[str, tuple[layouts.Part, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Reads all parameters into a nested dict; for arguments see `stream`."""
  return nested(stream(reader, table, shapes, folder))


def nested(parameters: Iterable[tuple[str, np.ndarray]]) -> dict[str, Any]:
  """Puts parameters on the default device, in the nested dict Linen takes.

  Args:
    parameters: pairs of a path, such as block_00/mlp_in/kernel, and an array.
  """
  params = {path: jnp.asarray(array) for path, array in parameters}
  return flax.traverse_util.unflatten_dict(params, sep='/')


def stream(
  reader: Reader,
  table: Mapping[str, tuple[layouts.Part, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  folder: pathlib.Path,
) -> Iterator[tuple[str, np.ndarray]]:
  """Checks all tensors, then reads the parameters one at a time.

  Args:
    reader: the reader of the folder.
    table: the tensors of each parameter by path, from `layouts`.
    shapes: the shape of each parameter by path.
    folder: the folder that errors name.

  Returns:
    An iterator of (path, float32 array) in the order of the table, which keeps
    the parameters of a block together.

  Raises:
    UserError: tensors are missing, extra or misshapen; it lists them.
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
  table: Mapping[str, tuple[layouts.Part, ...]],
  params: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Returns the tensors of parameters by name, the inverse of `read`.

  Args:
    family: clip, mlcd, resnet, open_clip or timm.
    table: the tensors of each parameter by path, from `layouts`.
    params: the parameters as a nested dict.
  """
  prefixes = {'open_clip': OPEN_CLIP_PREFIX, 'timm': '', 'resnet': ''}
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  tensors = {}
  for path, parts in table.items():
    array = np.asarray(jax.device_get(flat[path]), np.float32)
    # [1, 1, D] and [1, L, D] here and in timm; [D] and [L, D] elsewhere.
    if path in ('class_token', 'positions') and family != 'timm':
      array = array.reshape(array.shape[-2:])  # [L, D].
      array = array[0] if path == 'class_token' else array
    for part, piece in zip(parts, np.split(array, len(parts), axis=-1)):
      prefix = prefixes.get(family, _PREFIXES[0])
      prefix = '' if part.name == layouts.PROJECTION else prefix
      tensors[prefix + part.name] = part.to_theirs(piece)
  if family == 'resnet':
    tensors |= resnets.counters(tensors)
  if family == 'timm' and 'projection/kernel' in table:
    # timm's head has a bias, the projection has none.
    tensors['head.bias'] = np.zeros(flat['projection/kernel'].shape[1], 'f4')
  return tensors


def _check(reader, table, shapes, folder):
  """Raises UserError unless names and shapes are those of the table."""
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
  """Returns at most _SHOWN names as text, separated by commas."""
  more = len(names) - _SHOWN
  return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')


def _part_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
  """Returns the shape of one part if equal parts share the last axis."""
  return (*shape[:-1], shape[-1] // parts)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Removes leading axes of length 1.

  Only some layouts store class tokens and positions with such axes.
  """
  while len(shape) > 1 and shape[0] == 1:
    shape = shape[1:]
  return tuple(shape)


def _canonical(name: str) -> str:
  """Returns a tensor's name without prefix, as transformers 5 spells it.

  transformers has a typing error in `pre_layrnorm`; folders with the correct
  spelling are read too.
  """
  for prefix in _PREFIXES:
    name = name.removeprefix(prefix)
  return name.replace('pre_layernorm.', 'pre_layrnorm.')


def safetensors_files(
  folder: pathlib.Path, *, open_clip: bool = False
) -> list[pathlib.Path]:
  """Returns the files with the weights of a folder.

  These are the one whole file, else the files that the index names, else all
  safetensors files.

  Args:
    folder: the folder of the checkpoint.
    open_clip: prefer OpenCLIP's file, which may lie beside those of
      `transformers`.

  Raises:
    UserError: there are no files, or one that the index names is missing.
  """
  whole = folder / 'model.safetensors'
  index = folder / 'model.safetensors.index.json'
  if open_clip and (folder / open_clip_lib.WEIGHTS).is_file():
    return [folder / open_clip_lib.WEIGHTS]
  if whole.is_file():
    return [whole]
  if index.is_file():
    content = files.read_json(index)
    try:
      names = sorted(set(content['weight_map'].values()))
      # Without its folders a name cannot lead out of this folder.
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
