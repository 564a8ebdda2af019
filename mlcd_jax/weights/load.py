"""Loads encoders from disk: a run's, an imported one's, or a released one's."""

from collections.abc import Iterable
import dataclasses
import itertools
import pathlib
from typing import Any

import flax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors import numpy as safetensors_numpy

from mlcd_jax import models
from mlcd_jax.models import resnet
from mlcd_jax.models import vit
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import checkpoint
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import preprocessing

MODEL_FILE = 'model.json'
_WEIGHTS = 'params'  # Folder with a file for each module.
_CENTERS = ('params', 'classifier', 'weight')  # In the train state.


def load(
  path: str, field: str
) -> tuple[models.Encoder, dict[str, Any], pathlib.Path | None]:
  """Loads an encoder from wherever it is.

  Args:
    path: see `hub.find`.
    field: what to call the path in errors.

  Returns:
    The model, its variables, and the path if it is a run's.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  kind, folder = hub.find(path, field)
  if kind == hub.RUN:
    model, params, _ = from_run(folder)
    return model, {'params': params}, folder
  if kind == hub.IMPORTED:
    return *load_imported(folder), None
  return *huggingface.from_huggingface(folder, field=field), None


def load_preprocessing(
  path: str, field: str
) -> preprocessing.Preprocessing | None:
  """Loads how an encoder's images are prepared.

  Args:
    path: see `hub.find`.
    field: what to call the path in errors.

  Returns:
    None: as this project's training does, by transforms.resize_center_crop.
  """
  kind, folder = hub.find(path, field)
  if kind == hub.RELEASED:
    family, config = configs.read(folder)
    return preprocessing.read(folder, family, config['image_size'])
  made = None
  if kind == hub.IMPORTED:
    made = files.read_json(folder / MODEL_FILE).get('preprocessing')
  if made is None:
    return None
  pixels = {name: tuple(made[name]) for name in ('mean', 'std')}
  return preprocessing.Preprocessing(**(made | pixels))


def import_(source: str, target: pathlib.Path) -> None:
  """Writes any encoder as `save` does.

  Args:
    source: see `hub.find`.
    target: new folder.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  field = 'SRC'
  source = hub.pinned(source, field)
  if hub.find(source, field)[0] == hub.RELEASED:
    model, parameters = huggingface.stream_huggingface(source, field=field)
  else:
    model, variables, _ = load(source, field)
    flat = flax.traverse_util.flatten_dict(variables['params'], sep='/')
    parameters = ((name, np.asarray(x)) for name, x in flat.items())
  prepare = load_preprocessing(source, field)
  save(target, model, parameters, source=source, prepare=prepare)


def save(
  folder: pathlib.Path,
  model: models.Encoder,
  parameters: Iterable[tuple[str, np.ndarray]],
  *,
  source: str,
  prepare: preprocessing.Preprocessing | None = None,
) -> None:
  """Writes an encoder as `load` reads it: model.json and params/.

  A file holds one block or other module, and no more is in memory at a time.

  Args:
    folder: new, or empty.
    model: of the encoder.
    parameters: of the model: paths and arrays, those of a module in a row.
    source: where it came from, kept beside it.
    prepare: how its images are prepared; see `load_preprocessing`.
  """
  fields = {
    f.name: getattr(model, f.name)
    for f in dataclasses.fields(model)
    if f.name not in ('parent', 'name')
  }
  fields['dtype'] = str(jnp.dtype(model.dtype))
  module_of = lambda parameter: parameter[0].partition('/')[0]  # noqa: E731
  for module, group in itertools.groupby(parameters, module_of):
    with files.atomic(folder / _WEIGHTS / f'{module}.safetensors') as temporary:
      safetensors_numpy.save_file(dict(group), temporary)
  # Last, since it makes the folder one that can be loaded.
  content = {'model': fields, 'source': source}
  if prepare:
    content['preprocessing'] = dataclasses.asdict(prepare)
  files.write_json(folder / MODEL_FILE, content)


def from_run(
  workdir: pathlib.Path, *, classifier: bool = False
) -> tuple[models.Encoder, dict[str, Any], dict[str, Any]]:
  """Reads a checkpoint's encoder, without the rest of the state.

  Args:
    workdir: of a run, whose last checkpoint is read; or a checkpoint in it.
    classifier: read the class centers too.

  Returns:
    The model; its parameters, averaged where the run averages; and the run's
    `config` and `step`, and its class centers `classifier` if asked for.

  Raises:
    UserError: nothing is trained there, or it cannot be read.
  """
  folder, step = checkpoint_of(workdir)
  workdir = folder.parent
  made = files.read_json(folder / 'manifest.json')
  content = files.read_json(workdir / 'config.json')
  # What was trained, not what the workdir was last called with.
  for field, value in made['config'].items():
    section, _, name = field.partition('.')
    if section in ('model', 'loss', 'optimizer'):
      content[section][name] = value
  config = ml_collections.ConfigDict(content)
  model = models.make(config.model)
  params = huggingface.abstract_params(model)
  averaged = checkpoint.has(folder, step, 'ema')
  wanted = {'ema': params} if averaged else {'params': {'encoder': params}}
  if classifier:
    weight = {'weight': checkpoint.shape(folder, step, _CENTERS)}
    wanted.setdefault('params', {})['classifier'] = weight
  state = checkpoint.restore_part(folder, step, wanted)
  found = {'config': config, 'step': step}
  if classifier:
    found['classifier'] = state['params']['classifier']['weight']
  params = state['ema'] if averaged else state['params']['encoder']
  return model, params, found


def checkpoint_of(workdir: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Returns the folder of a run's checkpoints and the step that is read.

  Args:
    workdir: of a run, whose last checkpoint is read; or a checkpoint in it.

  Raises:
    UserError: nothing is trained there.
  """
  if workdir.absolute().parent.name == 'checkpoints':
    return workdir.absolute().parent, checkpoint.step_of(workdir.absolute())
  folder = workdir / 'checkpoints'
  step = distributed.decide(
    'last checkpoint', lambda: checkpoint.latest_step(folder)
  )
  if step is None:
    raise errors.UserError(f'{folder}: nothing is trained yet; train first')
  return folder, step


def imported_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """What `save` wrote: the description, then the weights."""
  weights = sorted((folder / _WEIGHTS).glob('*.safetensors'))
  return [folder / MODEL_FILE, *weights]


def load_imported(
  folder: pathlib.Path,
) -> tuple[models.Encoder, dict[str, Any]]:
  """Reads what `save` wrote."""
  fields = files.read_json(folder / MODEL_FILE)['model']
  fields['dtype'] = jnp.dtype(fields['dtype'])
  fields = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }
  model = (resnet.ResNet if 'blocks' in fields else vit.ViT)(**fields)
  flat = {}
  for path in imported_files(folder)[1:]:
    try:
      arrays = safetensors_numpy.load_file(path)
    except Exception as e:  # Its errors have no common base.
      raise errors.UserError(
        f'{path}: cannot be read ({e}); import it again'
      ) from e
    flat |= {name: jnp.asarray(array) for name, array in arrays.items()}
  if {name: x.shape for name, x in flat.items()} != huggingface.shapes(model):
    raise errors.UserError(
      f'{folder / _WEIGHTS}: not the parameters of {MODEL_FILE}; '
      'import it again'
    )
  return model, {'params': flax.traverse_util.unflatten_dict(flat, sep='/')}
