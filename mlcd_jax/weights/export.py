"""Exports encoders as folders that transformers, OpenCLIP or timm load."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from safetensors import numpy as safetensors_numpy

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.evaluate import table
from mlcd_jax.models import resnet
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import paths
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import layouts
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import open_clip
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import tensors


def export(
  workdir: str, target: pathlib.Path, *, layout: str = 'transformers'
) -> None:
  """Exports the encoder of a run, or an imported one.

  For `transformers` the model decides the class: a ViT with a class token and
  learned positions becomes a CLIPVisionModelWithProjection, one with rotary
  positions an MLCDVisionModel, and a ResNet a ResNetModel. The last two have no
  projection.

  Args:
    workdir: a workdir, one of its checkpoints, or a folder of `convert import`.
    target: the folder to write, new or empty.
    layout: one of open_clip.LAYOUTS.

  Raises:
    UserError: there is no encoder, or the layout has no such model.
  """
  folder = paths.local(workdir)
  if folder.is_dir() and hub.find(workdir, 'WORKDIR')[0] == hub.RELEASED:
    raise errors.UserError(
      f'WORKDIR={workdir}: released weights; `convert import` them first'
    )
  if (folder / load_lib.MODEL_FILE).is_file():
    model, variables = load_lib.load_imported(folder)
    content = files.read_json(folder / load_lib.MODEL_FILE)
    said = f'Converted from {content["source"]}.'
  else:
    model, params, found = load_lib.from_run(folder)
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
    folder: the folder to write, new or empty.
    model: a ViT with a class token and a norm before the blocks, or a ResNet.
    variables: the variables of the model, {'params': ...}.
    said: text about the origin of the weights, for the model card.
    layout: one of open_clip.LAYOUTS.

  Raises:
    UserError: the layout has no such model.
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
      metadata={'format': 'pt'},  # transformers requires it.
    )
  for name, content in jsons.items():
    files.write_json(folder / name, content)
  with files.atomic(folder / 'README.md') as temporary:
    temporary.write_text(_card(layout, model, jsons, said))


def _card(
  layout: str, model: models.Encoder, jsons: Mapping[str, Any], said: str
) -> str:
  """Returns the model card, in Markdown.

  Args:
    layout: one of open_clip.LAYOUTS.
    model: the exported model.
    jsons: the content of the JSON files of the export by name.
    said: text about the origin of the weights.
  """
  code = _USE[layout]
  if layout == 'transformers':
    name = jsons['config.json']['architectures'][0]
    # Only the class with a projection returns image_embeds.
    features = 'image_embeds' if 'Proj' in name else 'pooler_output'
    code = code.format(class_name=name, features=features)
  pooled = 'the class token\nafter the last norm, before the projection'
  if isinstance(model, resnet.ResNet):
    pooled = 'the mean of\nthe last map'
  return _CARD.format(
    library=layout, code=code, size=model.image_size, said=said, pooled=pooled
  )


# The model card and, by layout, the code in it that computes features.
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
  """Returns the config and the results of a run, in Markdown.

  Args:
    workdir: the workdir of the run.
    found: the third value that load.from_run returns.
  """
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
      # How a probe was fitted is no result.
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
