"""Parity with transformers itself, where it and torch are installed."""

import json

from flax import traverse_util
import jax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax.models import resnet
from mlcd_jax.runtime import errors
from mlcd_jax.weights import configs
from mlcd_jax.weights import export
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import layouts
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import text
from tests.weights import oracles

pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

# Sizes other than the goldens have: odd widths of heads, deeper, other grids.
OTHERS = {
  'clip': dict(hidden_size=33, num_attention_heads=3, image_size=35),
  'clip_bf16': dict(num_hidden_layers=4, patch_size=5, image_size=16),
  'mlcd': dict(hidden_size=32, num_attention_heads=2, image_size=35),
  'siglip': dict(hidden_size=45, num_attention_heads=3, image_size=23),
  'dinov2': dict(hidden_size=21, num_attention_heads=3, patch_size=3),
  'dinov2_registers': dict(num_register_tokens=1, image_size=14),
}


@pytest.mark.parametrize('name', OTHERS)
def test_same_features(name, tmp_path):
  model = oracles.make(name, seed=7, **OTHERS[name])
  oracles.save(name, model, tmp_path)
  ours, variables = huggingface.from_huggingface(tmp_path)
  last = 'hidden' if name.startswith(('clip', 'mlcd')) else 'tokens'
  names = {'pooler_output': 'pooled', 'image_embeds': 'embedding'}
  names['last_hidden_state'] = last
  own = (ours.image_size,) * 2
  for size in (own, (28, 42), (42, 35)):
    images = oracles.images(size)
    out = jax.jit(ours.apply)(variables, images)
    expected = oracles.outputs(name, model, images)
    assert len(expected) == 2
    for key, value in expected.items():
      error = np.abs(out[names[key]] - value).max() / np.abs(value).max()
      assert error < 1e-5, (size, key)


@pytest.mark.parametrize(
  'config',
  [
    dict(model_type='clip', vision_config_dict={'patch_size': 14}),
    dict(model_type='clip', vision_config=None, patch_size=14),
    dict(
      model_type='clip',
      vision_config={'patch_size': 16, 'hidden_act': 'gelu'},
      vision_config_dict={'patch_size': 14, 'image_size': 336},
      text_config={'hidden_act': 'gelu'},
      text_config_dict={'hidden_size': 16, 'num_attention_heads': 2},
    ),
    dict(
      model_type='siglip',
      vision_config={'patch_size': 14},
      vision_config_dict={'patch_size': 7},
    ),
    dict(model_type='mlcd', rope_scaling={'type': 'axial', 'rope_theta': 1e4}),
    dict(model_type='dinov2', num_register_tokens=3),
    dict(model_type='dinov2_with_registers'),
  ],
)
def test_same_towers_of_configs(config, tmp_path):
  import transformers

  (tmp_path / 'config.json').write_text(json.dumps(config))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  found = [
    (configs.read(tmp_path)[1], getattr(theirs, 'vision_config', theirs))
  ]
  if config['model_type'] == 'clip':
    found.append((text._config(tmp_path), theirs.text_config))
  for ours, tower in found:
    for name in set(ours) - {'architectures', 'projection_dim', 'rope_scaling'}:
      assert ours[name] == getattr(tower, name), name


@pytest.mark.parametrize(
  'fields',
  [
    dict(),
    dict(size=24, crop_size=24),
    dict(size={'shortest_edge': 31}, crop_size=[24, 24], resample=2),
    dict(size={'shortest_edge': 27}, crop_size=24, do_center_crop=True),
    dict(size=[24, 24], do_center_crop=False, resample=0),
    dict(size=24, default_to_square=True, do_center_crop=False, resample=5),
    dict(size={'height': 24, 'width': 24}, crop_size=24, image_std=[1, 2, 3]),
  ],
)
@pytest.mark.parametrize('name', ['CLIP', 'Bit', 'Siglip', 'ViT'])
def test_same_preprocessing(name, fields, tmp_path):
  import transformers

  saved = {'image_processor_type': f'{name}ImageProcessor'} | fields
  path = tmp_path / 'processor_config.json'
  path.write_text(json.dumps({'image_processor': saved}))
  try:
    ours = preprocessing.read(tmp_path, 'clip', 0)
  except errors.UserError as e:
    assert 'no square images' in str(e) and name in ('Siglip', 'ViT')
    return
  kind = getattr(transformers, f'{name}ImageProcessorPil')
  theirs = kind.from_pretrained(tmp_path)
  for i, size in enumerate(oracles.PHOTO_SIZES):
    photo = oracles.images(size, seed=i)[0]
    found = (ours(photo) / 255 - ours.mean) / ours.std
    expected = theirs(photo, return_tensors='np')['pixel_values'][0]
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=1e-5)


def _run_folder(kind, folder, images):
  """What a class of transformers makes of images, from an exported folder."""
  import torch
  import transformers

  model, loading = kind.from_pretrained(folder, output_loading_info=True)
  assert not any(
    loading[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')
  )
  process = transformers.AutoImageProcessor.from_pretrained(
    folder, use_fast=False
  )
  pixels = process(list(images), return_tensors='pt')['pixel_values']
  with torch.no_grad():
    return model.eval()(pixels)


@pytest.mark.parametrize('position', ['learned', 'rope2d'])
def test_exported_folder_gives_the_same_features(position, tmp_path, capfd):
  import transformers

  config = config_lib.default().model
  config.update(
    variant='Nano/7', image_size=21, embedding_dim=16, dtype='float32'
  )
  config.position = position
  model = models.make(config)
  images = oracles.images((21, 21))
  variables = model.init(jax.random.key(0), images)
  export.to_huggingface(tmp_path, model, variables)
  expected = model.apply(variables, images)
  classes = {
    'learned': transformers.CLIPVisionModelWithProjection,
    'rope2d': transformers.MLCDVisionModel,
  }
  out = _run_folder(classes[position], tmp_path, images)
  pairs = [(out.last_hidden_state, expected['hidden'])]
  if position == 'learned':
    pairs.append((out.image_embeds, expected['embedding']))
  else:
    pairs.append((out.pooler_output, expected['pooled']))
  for found, value in pairs:
    error = np.abs(found.numpy() - value).max() / np.abs(value).max()
    assert error < 1e-5
  said = capfd.readouterr().err
  assert 'newly initialized' not in said and 'not used' not in said


def test_exported_resnet_gives_the_same_features(tmp_path):
  import transformers

  config = config_lib.default().model
  config.update(
    variant='resnet_nano', image_size=32, pooling='average', dtype='float32'
  )
  model = models.make(config)
  images = oracles.images((32, 32))
  params = model.init(jax.random.key(0), images)['params']
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  params = tree.unflatten([x + rng.uniform(0, 0.2, x.shape) for x in leaves])
  export.to_huggingface(tmp_path, model, {'params': params})
  out = _run_folder(transformers.ResNetModel, tmp_path, images)
  found = out.pooler_output.flatten(1).numpy()
  expected = jax.jit(model.apply)({'params': params}, images)['pooled']
  assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize('name', ['deep', 'odd'])
def test_resnets_of_other_sizes(name):
  """Weights of transformers' own, at a size without whole positions."""
  fields = {
    'deep': dict(depths=[3, 2, 1], hidden_sizes=[16, 32, 64]),
    'odd': dict(embedding_size=6, hidden_sizes=[24, 48]),
  }[name]
  theirs = oracles.make_resnet(seed=1, **fields)
  ours = resnet.ResNet(
    width=theirs.config.embedding_size,
    blocks=tuple(theirs.config.depths),
    embedding_dim=0,
    dtype=np.float32,
  )
  pixels = np.random.default_rng(1).normal(size=(2, 45, 38, 3))
  pixels = pixels.astype(np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), pixels)['params']
  shapes = traverse_util.flatten_dict(shapes, sep='/')
  state = theirs.state_dict()
  params = {
    path: part.to_ours(state[part.name].numpy(), shapes[path].shape)
    for path, (part,) in layouts.of_images('resnet', ours).items()
  }
  out = jax.jit(ours.apply)(
    {'params': traverse_util.unflatten_dict(params, sep='/')}, pixels
  )
  expected = oracles.outputs_resnet(theirs, pixels, training=False)
  for key, value in expected.items():
    assert np.abs(out[key] - value).max() / np.abs(value).max() < 1e-5


@pytest.mark.parametrize(
  'name', ['clip', 'clip_with_text', 'clip_bf16', 'mlcd']
)
def test_round_trip(name, tmp_path, caplog):
  """Import, export, and what transformers then makes of the same images."""
  import torch
  import transformers

  ours, variables = huggingface.from_huggingface(oracles.GOLDENS / name)
  export.to_huggingface(tmp_path, ours, variables)
  class_name = {
    'clip': 'CLIPVisionModel',
    'mlcd': 'MLCDVisionModel',
  }.get(name, 'CLIPVisionModelWithProjection')
  transformers.utils.logging.enable_propagation()
  with caplog.at_level('WARNING'):
    theirs, loading = getattr(transformers, class_name).from_pretrained(
      tmp_path, output_loading_info=True
    )
  transformers.utils.logging.disable_propagation()
  assert not [r for r in caplog.records if 'transformers' in r.name]
  assert not any(
    loading[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')
  )
  golden = np.load(oracles.GOLDENS / name / 'golden.npz')
  for case in range(3):
    images = golden[f'{case}/images']
    pixels = (images / 255 - np.asarray(ours.mean)) / np.asarray(ours.std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    resized = {} if name == 'mlcd' else {'interpolate_pos_encoding': True}
    with torch.no_grad():
      out = theirs.eval()(pixels, **resized)
    for key in ('last_hidden_state', 'pooler_output', 'image_embeds'):
      if f'{case}/{key}' in golden and getattr(out, key, None) is not None:
        value = golden[f'{case}/{key}']
        error = np.abs(getattr(out, key).numpy() - value).max()
        assert error < 1e-5 * np.abs(value).max(), (case, key)
