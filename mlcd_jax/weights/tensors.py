"""Reads and writes the tensors of a tower, as `layouts` names them."""

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

# Prefixes of the tower inside of larger models.
_PREFIXES = ('vision_model.', 'dinov2.', 'dinov2_with_registers.', 'visual.')
OPEN_CLIP_PREFIX = _PREFIXES[-1]
# What other parts of those models are called, and what is no weight.
_TEXT = (layouts.TEXT_PREFIX, 'text_projection.')
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
  table: Mapping[str, tuple[layouts.Part, ...]],
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
  table: Mapping[str, tuple[layouts.Part, ...]],
  shapes: Mapping[str, tuple[int, ...]],
  folder: pathlib.Path,
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads the parameters one at a time.

  Args:
    reader: of the folder.
    table: see `layouts`.
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
  table: Mapping[str, tuple[layouts.Part, ...]],
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
      prefix = '' if part.name == layouts.PROJECTION else prefix
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


def safetensors_files(
  folder: pathlib.Path, *, open_clip: bool = False
) -> list[pathlib.Path]:
  """The files with a folder's weights: one, or those an index names.

  Args:
    folder: of the checkpoint.
    open_clip: OpenCLIP's own first, which may lie beside those of
      `transformers`.

  Raises:
    UserError: there are none, or one is missing.
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
