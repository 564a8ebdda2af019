"""Encoders on disk: a run's, an imported one's, or a Hugging Face folder's."""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import flax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors import numpy as safetensors_numpy

from mlcd_jax import checkpoint
from mlcd_jax import config as config_lib
from mlcd_jax import convert
from mlcd_jax import distributed
from mlcd_jax import errors
from mlcd_jax import files
from mlcd_jax import models
from mlcd_jax import paths
from mlcd_jax.evaluate import table
from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import folders
from mlcd_jax.huggingface import layouts
from mlcd_jax.huggingface import open_clip
from mlcd_jax.huggingface import preprocessing
from mlcd_jax.huggingface import tensors
from mlcd_jax.models import resnet
from mlcd_jax.models import vit

_MODEL = 'model.json'
_WEIGHTS = 'params'  # Folder with a file for each module.
_CENTERS = ('params', 'classifier', 'weight')  # In the train state.


def load(
  path: str, field: str
) -> tuple[models.Encoder, dict[str, Any], pathlib.Path | None]:
  """Loads an encoder from wherever it is.

  Args:
    path: see `folders.find`.
    field: what to call the path in errors.

  Returns:
    The model, its variables, and the path if it is a run's.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  kind, folder = folders.find(path, field)
  if kind == folders.RUN:
    model, params, _ = from_run(folder)
    return model, {'params': params}, folder
  if kind == folders.IMPORTED:
    return *_load_imported(folder), None
  return *convert.from_huggingface(folder, field=field), None


def load_preprocessing(
  path: str, field: str
) -> preprocessing.Preprocessing | None:
  """Loads how an encoder's images are prepared.

  Args:
    path: see `folders.find`.
    field: what to call the path in errors.

  Returns:
    None: as this project's training does, by transforms.resize_center_crop.
  """
  kind, folder = folders.find(path, field)
  if kind == folders.RELEASED:
    family, config = configs.read(folder)
    return preprocessing.read(folder, family, config['image_size'])
  made = None
  if kind == folders.IMPORTED:
    made = files.read_json(folder / _MODEL).get('preprocessing')
  if made is None:
    return None
  pixels = {name: tuple(made[name]) for name in ('mean', 'std')}
  return preprocessing.Preprocessing(**(made | pixels))


def import_(source: str, target: pathlib.Path) -> None:
  """Writes any encoder as `save` does.

  Args:
    source: see `folders.find`.
    target: new folder.

  Raises:
    UserError: there is no encoder, or not a whole one.
  """
  field = 'SRC'
  source = folders.pinned(source, field)
  if folders.find(source, field)[0] == folders.RELEASED:
    model, parameters = convert.stream_huggingface(source, field=field)
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
  files.write_json(folder / _MODEL, content)


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
  params = convert.abstract_params(model)
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


def export(
  workdir: str, target: pathlib.Path, *, layout: str = 'transformers'
) -> None:
  """Writes a run's or an imported encoder for others to load.

  For `transformers` a class token and a table of positions make a
  CLIPVisionModelWithProjection, rotary positions an MLCDVisionModel, a ResNet a
  ResNetModel; the last two have no projection.

  Args:
    workdir: of the run, or a folder of `convert import`.
    target: new folder.
    layout: one of open_clip.LAYOUTS.

  Raises:
    UserError: there is no encoder, or the layout has nothing like it.
  """
  folder = paths.local(workdir)
  if (
    folder.is_dir() and folders.find(workdir, 'WORKDIR')[0] == folders.RELEASED
  ):
    raise errors.UserError(
      f'WORKDIR={workdir}: released weights; `convert import` them first'
    )
  if (folder / _MODEL).is_file():
    model, variables = _load_imported(folder)
    content = files.read_json(folder / _MODEL)
    said = f'Converted from {content["source"]}.'
  else:
    model, params, found = from_run(folder)
    variables, said = {'params': params}, _recipe(folder, found)
  to_huggingface(target, model, variables, said=said, layout=layout)


def to_huggingface(
  folder: pathlib.Path,
  model: models.Encoder,
  variables: Mapping[str, Any],
  *,
  said: str = '',
  layout: str = 'transformers',
) -> None:
  """Writes a model as a folder that `transformers`, OpenCLIP or timm loads.

  Args:
    folder: new, or empty.
    model: a ViT with a class token and the norm before the blocks, or a
      ResNet.
    variables: of the model.
    said: about its origin, for the model card.
    layout: one of open_clip.LAYOUTS.

  Raises:
    UserError: the layout has nothing like it.
  """
  family, weights, jsons = layout, 'model.safetensors', {}
  if layout == 'open_clip':
    weights = 'open_clip_model.safetensors'
    jsons[open_clip.NAME] = open_clip.to_open_clip(model)
  elif layout == 'timm':
    jsons['config.json'] = open_clip.to_timm(model)
  else:
    family, jsons['config.json'] = configs.from_model(model)
    jsons[preprocessing.NAME] = preprocessing.to_json(
      model.image_size, model.mean, model.std
    )
  table = layouts.of_images(family, model)
  folder.mkdir(parents=True, exist_ok=True)
  with files.atomic(folder / weights) as temporary:
    safetensors_numpy.save_file(
      tensors.write(family, table, variables['params']),
      temporary,
      metadata={'format': 'pt'},  # What transformers asks for.
    )
  for name, content in jsons.items():
    files.write_json(folder / name, content)
  with files.atomic(folder / 'README.md') as temporary:
    temporary.write_text(_card(layout, model, jsons, said))


def _card(
  layout: str, model: models.Encoder, jsons: Mapping[str, Any], said: str
) -> str:
  """The model card."""
  code = _USE[layout]
  if layout == 'transformers':
    name = jsons['config.json']['architectures'][0]
    features = 'image_embeds' if 'Proj' in name else 'pooler_output'
    code = code.format(class_name=name, features=features)
  pooled = 'the class token\nafter the last norm, before the projection'
  if isinstance(model, resnet.ResNet):
    pooled = 'the mean of\nthe last map'
  return _CARD.format(
    library=layout, code=code, size=model.image_size, said=said, pooled=pooled
  )


_CARD = """\
---
library_name: {library}
pipeline_tag: image-feature-extraction
---

A vision encoder made with mlcd_jax. {said}

```python
{code}
```

Images are {size} x {size} pixels. What linear probes use is {pooled}.
"""

_USE = {
  'transformers': """\
from transformers import AutoImageProcessor, {class_name}

model = {class_name}.from_pretrained('this folder')
processor = AutoImageProcessor.from_pretrained('this folder')
features = model(**processor(image, return_tensors='pt')).{features}""",
  'open_clip': """\
import open_clip
from safetensors.torch import load_file

# There is no text tower in the file; the one that is made stays random.
model, _, processor = open_clip.create_model_and_transforms(
  'local-dir:this folder', load_weights=False
)
weights = load_file('this folder/open_clip_model.safetensors')
model.load_state_dict(weights, strict=False)
features = model.eval().encode_image(processor(image)[None])""",
  'timm': """\
import timm

model = timm.create_model('local-dir:this folder', pretrained=True).eval()
processor = timm.data.create_transform(
  **timm.data.resolve_model_data_config(model)
)
features = model(processor(image)[None])""",
}


def _recipe(workdir: pathlib.Path, found: Mapping[str, Any]) -> str:
  """What was run, in Markdown."""
  config = found['config']
  fields = config_lib.to_dict(config)
  rows = {
    section: fields[section]
    for section in ('data', 'embed', 'cluster', 'model', 'loss', 'optimizer')
  }
  text = json.dumps(rows, indent=2, sort_keys=True)
  results = workdir / 'results.json'
  scores = ''
  if results.is_file():
    trained = {
      k: round(v, 4)
      for k, v in files.read_json(results).items()
      if k.startswith('trained/')
      and isinstance(v, float)
      and k.split('/')[-1] not in table.OF_FITS
    }
    scores = (
      '\n\nResults:\n\n```json\n' + json.dumps(trained, indent=2) + '\n```'
    )
  return (
    f'Multi-label cluster discrimination (arXiv 2407.17331), step '
    f'{found["step"]}, batch {config.train.batch_size}, trained with:\n\n'
    f'```json\n{text}\n```{scores}'
  )


def imported_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """What `save` wrote: the description, then the weights."""
  weights = sorted((folder / _WEIGHTS).glob('*.safetensors'))
  return [folder / _MODEL, *weights]


def _load_imported(
  folder: pathlib.Path,
) -> tuple[models.Encoder, dict[str, Any]]:
  """Reads what `save` wrote."""
  fields = files.read_json(folder / _MODEL)['model']
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
  if {name: x.shape for name, x in flat.items()} != convert.shapes(model):
    raise errors.UserError(
      f'{folder / _WEIGHTS}: not the parameters of {_MODEL}; import it again'
    )
  return model, {'params': flax.traverse_util.unflatten_dict(flat, sep='/')}
