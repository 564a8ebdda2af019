"""Loads encoders of runs, imported encoders and released ones from disk."""

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

# An imported encoder is a folder with these: its attributes, and its parameters
# in one file per module.
MODEL_FILE = 'model.json'
_WEIGHTS = 'params'
_CENTERS = ('params', 'classifier', 'weight')  # Their path in the train state.


def load(
  path: str, field: str
) -> tuple[models.Encoder, dict[str, Any], pathlib.Path | None]:
  """Loads an encoder of any kind.

  Args:
    path: any path or name that `hub.find` accepts.
    field: the name of the config field or argument, for errors.

  Returns:
    The model, its variables, and the workdir or checkpoint of a run; None for
    other encoders.

  Raises:
    UserError: there is no encoder, or it is incomplete.
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
  """Loads the preprocessing that an encoder expects.

  Args:
    path: any path or name that `hub.find` accepts.
    field: the name of the config field or argument, for errors.

  Returns:
    The preprocessing; None = transforms.resize_center_crop, as in this
    project's own evaluation.

  Raises:
    UserError: there is no encoder, or its preprocessing is not supported.
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
  """Imports an encoder of any kind into a new folder.

  Args:
    source: any path or name that `hub.find` accepts.
    target: the folder to write, new or empty; see `save`.

  Raises:
    UserError: there is no encoder, or it is incomplete.
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
  """Writes an imported encoder as model.json and params/.

  Each file in params/ holds one top-level module, such as a block. Only one
  module at a time is in memory.

  Args:
    folder: the folder to write, new or empty.
    model: the model.
    parameters: pairs of a path and an array. Those of a module must follow each
      other.
    source: the path or name that the encoder came from, to record.
    prepare: the preprocessing to record; see `load_preprocessing`.
  """
  fields = {
    f.name: getattr(model, f.name)
    for f in dataclasses.fields(model)
    if f.name not in ('parent', 'name')  # Fields that Linen adds.
  }
  fields['dtype'] = str(jnp.dtype(model.dtype))
  module_of = lambda parameter: parameter[0].partition('/')[0]  # noqa: E731
  for module, group in itertools.groupby(parameters, module_of):
    with files.atomic(folder / _WEIGHTS / f'{module}.safetensors') as temporary:
      safetensors_numpy.save_file(dict(group), temporary)
  # Written last: with this file the folder counts as an encoder.
  content = {'model': fields, 'source': source}
  if prepare:
    content['preprocessing'] = dataclasses.asdict(prepare)
  files.write_json(folder / MODEL_FILE, content)


def from_run(
  workdir: pathlib.Path, *, classifier: bool = False
) -> tuple[models.Encoder, dict[str, Any], dict[str, Any]]:
  """Reads the encoder of a run's checkpoint, but not the rest of its state.

  Args:
    workdir: a workdir, whose last checkpoint is read, or a checkpoint in it.
    classifier: read the class centers too.

  Returns:
    The model; its parameters, which are the moving average if the run keeps
    one; and a dict with `config`, `step` and, if asked for, the class centers
    `classifier`.

  Raises:
    UserError: nothing is trained there, or the checkpoint cannot be read.
  """
  folder, step = checkpoint_of(workdir)
  workdir = folder.parent
  made = files.read_json(folder / 'manifest.json')
  content = files.read_json(workdir / 'config.json')
  # The last invocation wrote config.json and may have changed these fields. The
  # manifest records those that the training used.
  for field, value in made['config'].items():
    section, _, name = field.partition('.')
    if section in ('model', 'loss', 'optimizer'):
      content[section][name] = value
  cluster = content['cluster']
  # What the stage chose; runs of before this was recorded had to name it.
  cluster['num_centers'] = made['notes'].get(
    'num_centers', cluster['num_centers']
  )
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
  """Returns the folder of a run's checkpoints and the step to read.

  Args:
    workdir: a workdir, whose last checkpoint is read, or a checkpoint in it.

  Raises:
    UserError: nothing is trained there, or there is no such checkpoint.
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
  """Returns the files that `save` wrote: model.json, then the parameters."""
  weights = sorted((folder / _WEIGHTS).glob('*.safetensors'))
  return [folder / MODEL_FILE, *weights]


def load_imported(
  folder: pathlib.Path,
) -> tuple[models.Encoder, dict[str, Any]]:
  """Reads an encoder that `save` wrote.

  Args:
    folder: the folder of the encoder.

  Returns:
    The model and its variables.

  Raises:
    UserError: a file is damaged or does not match model.json.
  """
  fields = files.read_json(folder / MODEL_FILE)['model']
  fields['dtype'] = jnp.dtype(fields['dtype'])
  # JSON turns tuples into lists, with which the module could not be hashed.
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
