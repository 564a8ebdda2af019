"""Parity with OpenCLIP and timm themselves, where they are installed."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.weights import export
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import preprocessing
from tests.weights import oracles

pytest.importorskip('torch', reason='torch is not installed')

SIDE = 21


@pytest.fixture(name='exported', params=['gelu', 'quick_gelu'])
def fixture_exported(request):
  """A model of ours, its variables, images, and what it makes of them."""
  config = config_lib.default().model
  config.update(variant='Nano/7', image_size=SIDE, embedding_dim=16)
  config.update(dtype='float32', activation=request.param)
  model = models.make(config)
  images = oracles.images((SIDE, SIDE))
  variables = model.init(jax.random.key(0), images)
  return model, variables, images, model.apply(variables, images)


def relative(found, expected):
  return np.abs(found.numpy() - expected).max() / np.abs(expected).max()


def pixels(model, images):
  import torch

  values = (images / 255 - np.asarray(model.mean)) / np.asarray(model.std)
  return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


@pytest.mark.parametrize(
  'sizes',
  [
    dict(),
    dict(width=33, head_width=11, image_size=35, mlp_ratio=2.3),
    dict(layers=3, patch_size=5, image_size=20),
  ],
)
def test_reads_open_clip(sizes, tmp_path):
  pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
  theirs, config = oracles.make_open_clip(seed=5, **sizes)
  oracles.save_open_clip(theirs, config, tmp_path)
  ours, variables = huggingface.from_huggingface(tmp_path)
  images = oracles.images((ours.image_size,) * 2)
  out = jax.jit(ours.apply)(variables, images)
  expected = oracles.outputs_open_clip(theirs, images)
  for key, name in (('image_embeds', 'embedding'), ('pooler_output', 'pooled')):
    error = np.abs(out[name] - expected[key]).max()
    assert error < 1e-5 * np.abs(expected[key]).max()


@pytest.mark.parametrize(
  'fields',
  [
    {},
    dict(mean=0.5, std=0.25),
    dict(interpolation='bilinear', mean=None),
    dict(resize_mode='squash', size=[9, 9], fill_color=3),
    dict(interpolation='random', size=7),
  ],
)
def test_same_preprocessing(fields, tmp_path):
  pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
  from open_clip import transform

  content = dict(model_cfg=oracles.OPEN_CLIP, preprocess_cfg=fields)
  (tmp_path / 'open_clip_config.json').write_text(json.dumps(content))
  ours = preprocessing.read(tmp_path, 'open_clip', SIDE)
  config = transform.merge_preprocess_dict({}, fields) | {'size': SIDE}
  theirs = transform.image_transform_v2(
    transform.PreprocessCfg(**config), is_train=False
  )
  for i, size in enumerate((*oracles.PHOTO_SIZES, (33, 36), (21, 24))):
    photo = oracles.images(size, seed=i)[0]
    found = (ours(photo) / 255 - ours.mean) / ours.std
    expected = theirs(Image.fromarray(photo)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_open_clip_loads_what_is_exported(exported, tmp_path):
  open_clip = pytest.importorskip(
    'open_clip', reason='open_clip_torch is not installed'
  )
  from safetensors import torch as safetensors_torch
  import torch

  model, variables, images, expected = exported
  export.to_huggingface(tmp_path, model, variables, layout='open_clip')
  theirs, _, process = open_clip.create_model_and_transforms(
    f'local-dir:{tmp_path}', load_weights=False
  )
  keys = theirs.load_state_dict(
    safetensors_torch.load_file(tmp_path / 'open_clip_model.safetensors'),
    strict=False,
  )
  assert not keys.unexpected_keys
  assert not [k for k in keys.missing_keys if k.startswith('visual.')]
  with torch.no_grad():
    found = theirs.eval().encode_image(pixels(model, images))
  assert relative(found, expected['embedding']) < 1e-5
  normalize = process.transforms[-1]
  assert tuple(normalize.mean) == model.mean


def test_timm_loads_what_is_exported(exported, tmp_path):
  timm = pytest.importorskip('timm', reason='timm is not installed')
  import torch

  model, variables, images, expected = exported
  export.to_huggingface(tmp_path, model, variables, layout='timm')
  # Strict: it raises on missing and unexpected keys.
  theirs = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
  with torch.no_grad():
    found = theirs(pixels(model, images))
    pooled = theirs.forward_head(
      theirs.forward_features(pixels(model, images)), pre_logits=True
    )
  assert relative(found, expected['embedding']) < 1e-5
  assert relative(pooled, expected['pooled']) < 1e-5
  pixels_of = timm.data.resolve_model_data_config(theirs)
  assert tuple(pixels_of['mean']) == model.mean
