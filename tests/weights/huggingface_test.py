"""Weights in: numbers recorded from transformers, and folders that are wrong.

The recorder is tests/weights/oracles.py.
"""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import flax
from huggingface_hub import constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mlcd_jax.runtime import errors
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import layouts
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import tensors

GOLDENS = pathlib.Path(__file__).parent.parent / 'goldens'
MODELS = sorted({p.parent.name for p in GOLDENS.glob('*/*.safetensors')})
PROCESSORS = sorted(p.parent.name for p in GOLDENS.glob('*/preprocessor*'))


def relative(found, expected):
  """Largest difference in shares of the largest value."""
  expected = np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


# One of each way that blocks differ; with the others scanned is slow.
_SCANNED = ('clip_with_text', 'dinov2_swiglu', 'mlcd', 'siglip')


@pytest.mark.parametrize(
  ('name', 'scan_layers'),
  [
    pytest.param(
      name,
      scan,
      marks=pytest.mark.slow if scan and name not in _SCANNED else (),
    )
    for name in MODELS
    for scan in (False, True)
  ],
)
def test_agrees_with_transformers(name, scan_layers):
  model, variables = huggingface.from_huggingface(
    GOLDENS / name, scan_layers=scan_layers
  )
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  golden = np.load(GOLDENS / name / 'golden.npz')
  last = 'hidden' if name.startswith(('clip', 'mlcd')) else 'tokens'
  names = {'pooler_output': 'pooled', 'image_embeds': 'embedding'}
  names['last_hidden_state'] = last
  encode = jax.jit(model.apply)
  compared = 0
  for case in range(3):
    out = encode(variables, golden[f'{case}/images'])
    for theirs, ours in names.items():
      if f'{case}/{theirs}' in golden:
        assert relative(out[ours], golden[f'{case}/{theirs}']) < 1e-5
        compared += 1
    if 'projection' not in variables['params']:
      np.testing.assert_array_equal(out['embedding'], out['pooled'])
  assert compared >= 6


def test_every_family_is_recorded():
  types = {
    json.loads(path.read_text())['model_type']
    for path in GOLDENS.glob('*/config.json')
  }
  assert {configs.read(GOLDENS / name)[0] for name in MODELS} == set(
    configs.PIXELS
  )
  assert 'dinov2_with_registers' in types


def test_sixteen_bits_stay_close():
  for name in MODELS:
    model, variables = huggingface.from_huggingface(
      GOLDENS / name, dtype='bfloat16'
    )
    golden = np.load(GOLDENS / name / 'golden.npz')
    projected = 'projection' in variables['params']
    a = golden['0/image_embeds' if projected else '0/pooler_output']
    b = jax.jit(model.apply)(variables, golden['0/images'])['embedding']
    cosine = (a * b).sum(1) / (
      np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    )
    assert cosine.min() > 1 - 1e-3, name


@pytest.fixture(name='folder')
def fixture_folder(tmp_path):
  return shutil.copytree(GOLDENS / 'clip', tmp_path / 'clip')


def rewrite(folder, change):
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  safetensors_numpy.save_file(change(tensors), path)


def test_prefixes_and_both_spellings_are_read(folder):
  _, expected = huggingface.from_huggingface(folder)
  rewrite(
    folder,
    lambda tensors: (
      {
        'vision_model.' + k.replace('pre_layrnorm', 'pre_layernorm'): v
        for k, v in tensors.items()
      }
      | {'vision_model.embeddings.position_ids': np.arange(10)[None]}
    ),
  )
  _, found = huggingface.from_huggingface(folder)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_wrong_tensors_are_listed_by_name(folder):
  def change(tensors):
    del tensors['post_layernorm.bias']
    tensors['surprise.weight'] = np.zeros(3, np.float32)
    fc1 = 'encoder.layers.1.mlp.fc1.weight'
    tensors[fc1] = np.ascontiguousarray(tensors[fc1][:5])
    return tensors

  rewrite(folder, change)
  with pytest.raises(errors.UserError) as e:
    huggingface.from_huggingface(folder)
  for words in (
    'missing: post_layernorm.bias',
    'extra: surprise.weight',
    'misshapen: encoder.layers.1.mlp.fc1.weight [5, 20] instead of [28, 20]',
  ):
    assert words in str(e.value)


def test_announced_projection_must_be_there(folder):
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config['architectures'] = ['CLIPVisionModelWithProjection']
  path.write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match='missing: visual_projection'):
    huggingface.from_huggingface(folder)


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('model_type', 'bert', "model_type='bert' is unknown.*clip"),
    ('hidden_act', 'relu', "hidden_act='relu' is unknown"),
    ('num_channels', 1, 'num_channels=1 is not supported'),
    ('image_size', 28, 'misshapen: embeddings.position_embedding.weight'),
  ],
)
def test_configs_that_do_not_fit_are_refused(folder, field, value, says):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(errors.UserError, match=says):
    huggingface.from_huggingface(folder)


_MALFORMED = {
  'config.json': (
    '[]',
    '{',
    '\xff',
    '{"model_type": ["clip"]}',
    '{"model_type": "clip", "vision_config": 3}',
    '{"model_type": "mlcd", "rope_parameters": [1]}',
    *(
      json.dumps({'model_type': 'clip_vision_model', field: value})
      for field, value in (
        ('hidden_size', '20'),
        ('hidden_size', 0),
        ('hidden_size', 20.5),
        ('hidden_size', True),
        ('num_hidden_layers', 10**9),
        ('num_attention_heads', 7),
        ('patch_size', 0),
        ('image_size', [21, 21]),
        ('image_size', -7),
        ('layer_norm_eps', float('nan')),
        ('layer_norm_eps', None),
        ('hidden_act', ['gelu']),
        ('hidden_act', None),
      )
    ),
  ),
  preprocessing.NAME: (
    '[]',
    '{"size": "24"}',
    '{"size": 10000000, "do_center_crop": true, "crop_size": 24}',
    '{"size": 24, "crop_size": [24], "do_center_crop": true}',
    '{"size": 24, "crop_size": -4, "do_center_crop": true}',
    *(
      json.dumps(
        {'size': 24, 'crop_size': 24, 'do_center_crop': True, field: value}
      )
      for field, value in (
        ('image_mean', 0.5),
        ('image_mean', [0.5, 0.5]),
        ('image_std', [1, 1, 0]),
        ('image_std', ['a', 'b', 'c']),
        ('resample', 17),
        ('rescale_factor', '1/255'),
      )
    ),
  ),
  'model.safetensors.index.json': (
    '[]',
    '{"weight_map": ["model.safetensors"]}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../../../../etc/passwd"}}',
  ),
}


@pytest.mark.parametrize(
  ('name', 'content'),
  [(name, text) for name, texts in _MALFORMED.items() for text in texts],
  ids=itertools.count(),
)
def test_malformed_files_are_refused_by_name(folder, name, content):
  if name.endswith('index.json'):
    (folder / 'model.safetensors').rename(folder / 'other.safetensors')
  (folder / name).write_bytes(content.encode('latin-1'))
  with pytest.raises(errors.UserError) as e:
    huggingface.from_huggingface(folder)
  assert str(folder) in str(e.value)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'vision_cfg': {'timm_model_name': 'vit'}}, 'timm_model_name'),
    ({'vision_cfg': {'attentional_pool': True}}, 'attentional_pool=True'),
    ({'vision_cfg': {'layers': [3, 4, 6, 3]}}, 'num_hidden_layers'),
    ({'vision_cfg': {'head_width': 0}}, 'not as OpenCLIP writes it'),
    ({'vision_cfg': []}, 'not as OpenCLIP writes it'),
    ({'embed_dim': 7}, r'misshapen: proj \[20, 6\]'),
  ],
)
def test_open_clip_configs_that_do_not_fit_are_refused(tmp_path, change, says):
  folder = shutil.copytree(GOLDENS / 'open_clip', tmp_path / 'a')
  path = folder / 'open_clip_config.json'
  content = json.loads(path.read_text())
  if change.get('vision_cfg'):
    content['model_cfg']['vision_cfg'] |= change['vision_cfg']
  else:
    content['model_cfg'] |= change
  path.write_text(json.dumps(content))
  with pytest.raises(errors.UserError, match=says):
    huggingface.from_huggingface(folder)


def test_weights_of_other_types_are_refused(folder):
  rewrite(
    folder, lambda tensors: {k: v.astype(np.int8) for k, v in tensors.items()}
  )
  with pytest.raises(errors.UserError, match='of type I8.*only F32'):
    huggingface.from_huggingface(folder)


def test_pickles_and_broken_files_are_refused(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(errors.UserError, match='cannot be read as safetensors'):
    huggingface.from_huggingface(folder)
  path.rename(folder / 'pytorch_model.bin')
  with pytest.raises(errors.UserError, match='pickled weights are not read'):
    huggingface.from_huggingface(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(errors.UserError, match='no config.json'):
    huggingface.from_huggingface(folder)


def test_missing_shard_is_named(tmp_path):
  folder = shutil.copytree(GOLDENS / 'clip_bf16', tmp_path / 'clip')
  (folder / 'model-00003-of-00006.safetensors').unlink()
  with pytest.raises(errors.UserError, match='00003-of-00006.*missing'):
    huggingface.from_huggingface(folder)


_IMPORT = """
import pathlib, sys
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import load as load_lib

def memory(field):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith(field)) << 10

def run(source, target):
  model, parameters = huggingface.stream_huggingface(source)
  load_lib.save(pathlib.Path(target), model, parameters, source=source)

run(sys.argv[1], sys.argv[2] + '/small')  # What is made once.
pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak begins anew.
before = memory('VmRSS')
run(sys.argv[3], sys.argv[2] + '/large')
print(memory('VmHWM') - before)
"""


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/clear_refs').exists(), reason='needs Linux'
)
def test_import_needs_less_memory_than_the_weights(tmp_path):
  folder = shutil.copytree(GOLDENS / 'clip', tmp_path / 'clip')
  path = folder / 'config.json'
  sizes = dict(hidden_size=512, intermediate_size=2_048, num_hidden_layers=24)
  path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
  (folder / 'model.safetensors').unlink()
  model = configs.to_model(
    *configs.read(folder),
    embedding_dim=0,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    dtype='float32',
    scan_layers=False,
  )
  params = {
    path: np.ones(shape, np.float32)
    for path, shape in huggingface.shapes(model).items()
  }
  weights = sum(x.nbytes for x in params.values())
  table = layouts.of_images('clip', model)
  safetensors_numpy.save_file(
    tensors.write(
      'clip', table, flax.traverse_util.unflatten_dict(params, sep='/')
    ),
    folder / 'model.safetensors',
  )
  done = subprocess.run(
    [sys.executable, '-c', _IMPORT, GOLDENS / 'clip', tmp_path, folder],
    cwd=GOLDENS.parent.parent,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  largest = max(x.nbytes for x in params.values())
  assert weights > 300e6
  assert int(done.stdout) < weights / 2 + largest


def test_names_are_looked_up_in_the_hubs_cache(tmp_path, monkeypatch, caplog):
  commit = '0123456789abcdef0123456789abcdef01234567'
  cached = tmp_path / 'models--org--name'
  shutil.copytree(GOLDENS / 'clip', cached / 'snapshots' / commit)
  (cached / 'refs').mkdir()
  (cached / 'refs/main').write_text(commit)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  with caplog.at_level('INFO', 'mlcd_jax'):
    found = hub.resolve('org/name', 'embed.path')
  assert found.name == commit
  assert f'org/name@{commit} pins it' in caplog.text
  assert hub.resolve(f'org/name@{commit}', 'embed.path') == found
  assert hub.pinned('org/name', 'embed.path') == f'org/name@{commit}'
  assert hub.pinned(str(found), 'embed.path') == str(found)
  with pytest.raises(errors.UserError, match='embed.path=org/other: no such'):
    hub.resolve('org/other', 'embed.path')
  with pytest.raises(errors.UserError, match='not a name such as ORG/NAME'):
    hub.resolve('/no/such/folder', 'embed.path')


@pytest.mark.parametrize('name', PROCESSORS)
def test_preprocessing_agrees_with_transformers(name):
  golden = np.load(GOLDENS / name / 'golden.npz')
  family = name.partition('_')[2]
  prepare = preprocessing.read(GOLDENS / name, family, 0)
  assert prepare.image_size == 24
  cases = sorted({key.partition('/')[0] for key in golden})
  assert len(cases) == 5
  for case in cases:
    pixels = prepare(golden[f'{case}/image']) / 255
    np.testing.assert_allclose(
      (pixels - prepare.mean) / prepare.std, golden[f'{case}/pixels'], atol=1e-5
    )


def test_preprocessing_for_another_size():
  folder = GOLDENS / 'preprocessing_dinov2'
  prepare = preprocessing.read(folder, 'dinov2', 0).at(48)
  assert (prepare.image_size, prepare.shorter_side) == (48, 62)
  assert prepare(np.zeros((20, 90, 3), np.uint8)).shape == (48, 48, 3)
  prepare = preprocessing.read(GOLDENS / 'siglip', 'siglip', 21)
  assert prepare(np.zeros((20, 90, 3), np.uint8)).shape == (21, 21, 3)
  assert prepare.mean == (0.5, 0.5, 0.5)


def test_preprocessing_that_is_not_done_here_is_refused(tmp_path):
  def read(**fields):
    (tmp_path / preprocessing.NAME).write_text(json.dumps(fields))
    return preprocessing.read(tmp_path, 'clip', 0)

  assert read(size=24, crop_size=24, do_center_crop=True).shorter_side == 24
  for fields, says in (
    (dict(size={'height': 24, 'width': 32}), 'no square images'),
    (dict(size=24, do_resize=False), 'no square images'),
    (dict(size=24, crop_size=32, do_center_crop=True), 'crop_size=32 is more'),
    (
      dict(size=24, crop_size=24, do_center_crop=True, rescale_factor=1.0),
      'rescale_factor=1.0',
    ),
    (
      dict(size=24, crop_size=24, do_center_crop=True, do_normalize=False),
      'do_normalize=False',
    ),
  ):
    with pytest.raises(errors.UserError, match=says):
      read(**fields)
