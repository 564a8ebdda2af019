"""Encoders out and in again, and training that starts from them."""

import json
import pathlib
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.cluster import labels
from mlcd_jax.embed import encoder
from mlcd_jax.evaluate import encoders as evaluate_encoders
from mlcd_jax.models import positions
from mlcd_jax.runtime import errors
from mlcd_jax.train import init
from mlcd_jax.train import sampling
from mlcd_jax.train import step
from mlcd_jax.weights import checkpoint
from mlcd_jax.weights import export
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import open_clip
from mlcd_jax.weights import pinned

GOLDENS = pathlib.Path(__file__).parent.parent / 'goldens'


@pytest.fixture(scope='module', name='folder')
def fixture_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('encoders') / 'run'


@pytest.fixture(name='config')
def fixture_config(tiny_config):
  tiny_config.model.pooling = 'class_token'
  tiny_config.train.steps = 2
  tiny_config.train.ema_decay = 0.5
  return tiny_config


@pytest.fixture(name='run')
def fixture_run(config, folder):
  """A workdir with a trained encoder; made once, and only read."""
  if not folder.exists():
    made = config.copy_and_resolve_references()
    # One center for every 4 images: the 64 of the config.
    made.cluster.num_centers = 0
    made.data.split = 'train[:256]'
    stages.run(made, folder, ('embed', 'cluster', 'train'))
  return folder


def state_of(config, run):
  """The state that a run on the same clusters starts from."""
  program = step.Program(
    config=config,
    num_classes=config.cluster.num_centers,
    steps=2,
    mesh=sharding.make_mesh(4, 2),
  )
  made = labels.Labels(manifests.load(run / 'clusters'))
  return init.make(program, clusters=made.folder), program


def images(size):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (2, size, size, 3), np.uint8)


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_export_and_import_give_the_same_parameters(run, config, tmp_path):
  export.export(str(run), tmp_path / 'exported')
  model, variables = huggingface.from_huggingface(tmp_path / 'exported')
  expected, params, found = load_lib.from_run(run)
  assert_same(variables['params'], params)
  assert found['step'] == 2
  assert_same(
    jax.jit(model.apply)(variables, images(28))['embedding'],
    jax.jit(expected.apply)({'params': params}, images(28))['embedding'],
  )
  saved = json.loads((tmp_path / 'exported/config.json').read_text())
  assert saved['architectures'] == ['CLIPVisionModelWithProjection']
  assert saved['projection_dim'] == 32 and saved['hidden_act'] == 'gelu'
  card = (tmp_path / 'exported/README.md').read_text()
  assert 'step 2' in card and '"num_centers": 64' in card


def test_one_of_several_checkpoints_by_its_folder(run):
  _, expected, found = load_lib.from_run(run)
  path = run / 'checkpoints' / str(found['step'])
  _, variables, where = load_lib.load(str(path), 'field')
  jax.tree.map(np.testing.assert_array_equal, variables['params'], expected)
  assert where == path
  assert load_lib.from_run(path, classifier=True)[2]['step'] == found['step']
  with pytest.raises(errors.UserError, match='/7: no checkpoint; there are 2'):
    load_lib.load(str(path.with_name('7')), 'field')


def test_a_run_goes_where_a_folder_does(run, tmp_path):
  path = run / 'checkpoints/2'
  identity = evaluate_encoders.identity(str(run))
  assert identity['step'] == 2 and identity['train']
  assert evaluate_encoders.identity(str(path)) == identity
  pinned.check(pinned.pin(str(run), 'embed.path') | {'other': 0}, 'embed.path')
  embeds = encoder.Huggingface(
    str(run), image_size=0, batch_size=1, dtype='float32'
  )
  assert embeds.image_size == 28
  load_lib.import_(str(path), tmp_path / 'copy')
  model, variables, _ = load_lib.load(str(tmp_path / 'copy'), 'x')
  expected, params, _ = load_lib.from_run(run)
  assert model == expected
  assert_same(variables['params'], params)
  # Prepared as in training, like the run itself.
  assert load_lib.load_preprocessing(str(tmp_path / 'copy'), 'x') is None
  with pytest.raises(errors.UserError, match='no encoder.*checkpoints'):
    load_lib.load(str(run / 'embeddings'), 'field')


def test_the_average_is_what_is_exported(run, config):
  _, params, found = load_lib.from_run(run, classifier=True)
  program = state_of(config, run)[1]
  checkpointer = checkpoint.Checkpointer(run / 'checkpoints')
  state = checkpointer.restore(2, program.abstract_state)
  checkpointer.close()
  assert_same(params, state.ema)
  now = state.params['encoder']['block_00']['mlp_in']['kernel']
  averaged = params['block_00']['mlp_in']['kernel']
  assert (np.asarray(averaged) != np.asarray(now)).any()
  assert_same(found['classifier'], state.params['classifier']['weight'])


def test_rotary_models_are_exported_as_mlcd(config, tmp_path):
  config.model.position = 'rope2d'
  model = models.make(config.model)
  variables = jax.jit(model.init)(jax.random.key(0), images(28))
  export.to_huggingface(tmp_path, model, variables)
  again, found = huggingface.from_huggingface(tmp_path)
  expected = dict(variables['params'])
  del expected['projection']  # The class there has none.
  assert_same(found['params'], expected)
  assert again.position == 'rope2d'


def test_open_clip_layout_goes_out_and_in(run, tmp_path):
  export.export(str(run), tmp_path, layout='open_clip')
  assert_same(
    huggingface.from_huggingface(tmp_path)[1]['params'],
    load_lib.from_run(run)[1],
  )
  config = json.loads((tmp_path / 'open_clip_config.json').read_text())
  assert config['model_cfg']['vision_cfg']['image_size'] == 28
  assert 'step 2' in (tmp_path / 'README.md').read_text()


def test_hidden_width_survives_the_ratio():
  # 4304 / 1152 and its like, where int(width * ratio) would be one less.
  for width, mlp_dim in ((1_152, 4_304), (768, 3_072), (49, 106), (22, 31)):
    model = models.make(config_lib.default().model).clone(
      width=width, mlp_dim=mlp_dim
    )
    ratio = open_clip.to_timm(model)['model_args']['mlp_ratio']
    assert int(width * ratio) == mlp_dim


@pytest.mark.parametrize('layout', ['open_clip', 'timm'])
def test_what_the_layouts_have_not_is_refused(config, layout, tmp_path):
  config.model.position = 'rope2d'
  model = models.make(config.model)
  with pytest.raises(errors.UserError, match='model.position=rope2d.*--layout'):
    export.to_huggingface(tmp_path, model, {}, layout=layout)


def test_what_transformers_has_no_class_for_is_refused(config, tmp_path):
  config.model.pooling = 'average'
  model = models.make(config.model)
  with pytest.raises(errors.UserError, match='model.pooling=average'):
    export.to_huggingface(tmp_path, model, {})


@pytest.mark.parametrize('name', ['siglip', 'dinov2_registers', 'mlcd'])
def test_imported_folders_load_as_they_are(name, tmp_path):
  model, variables = huggingface.from_huggingface(GOLDENS / name)
  params = jax.device_get(variables['params'])
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  load_lib.save(tmp_path / 'a', model, flat.items(), source=name)
  again, found, workdir = load_lib.load(str(tmp_path / 'a'), 'field')
  assert workdir is None and again == model
  assert_same(found, variables)
  path = tmp_path / 'a/params/block_01.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match='block_01.*import it again'):
    load_lib.load(str(tmp_path / 'a'), 'field')
  path.unlink()
  with pytest.raises(errors.UserError, match='params: not the parameters of'):
    load_lib.load(str(tmp_path / 'a'), 'field')


def test_command(tmp_path):
  def convert_command(*words):
    return subprocess.run(
      [sys.executable, '-m', 'mlcd_jax.convert', *map(str, words)],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
    )

  imported, exported = tmp_path / 'imported', tmp_path / 'exported'
  done = convert_command('import', GOLDENS / 'clip_bf16', imported)
  assert done.returncode == 0, done.stderr
  done = convert_command('export', imported, exported)
  assert done.returncode == 0, done.stderr
  assert_same(
    huggingface.from_huggingface(exported)[1],
    huggingface.from_huggingface(GOLDENS / 'clip_bf16')[1],
  )
  for words, says in (
    (('export', imported, exported), 'exists already'),
    (('import', imported), 'import SRC DST'),
    (('export', imported, tmp_path / 'c', '--layout=jax'), 'open_clip'),
    (('export', tmp_path / 'none', tmp_path / 'b'), 'nothing is trained yet'),
  ):
    done = convert_command(*words)
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.startswith('error:')


def test_training_starts_from_a_smaller_run(run, config):
  config.model.image_size = 42
  config.model.init_from = str(run)
  config.model.init_classifier = 'kept'
  state, _ = state_of(config, run)
  _, params, found = load_lib.from_run(run, classifier=True)
  encoder = jax.device_get(state.params['encoder'])
  table = positions.interpolate(params['positions'][0], (3, 3), (2, 2), extra=1)
  np.testing.assert_allclose(encoder['positions'][0], table, atol=1e-6)
  np.testing.assert_array_equal(table[0], params['positions'][0, 0])
  del encoder['positions'], params['positions']
  assert_same(encoder, params)
  assert_same(state.params['classifier']['weight'], found['classifier'])
  assert_same(state.ema, state.params['encoder'])
  assert int(state.step) == 0


def test_classifier_starts_from_the_centers(run, config):
  config.model.embedding_dim = 324
  config.model.init_classifier = 'centers'
  state, program = state_of(config, run)
  centers = np.load(run / 'clusters/centers.npy')
  rows = sampling.Layout(64).row_of(np.arange(64))
  weight = np.asarray(state.params['classifier']['weight'])[np.asarray(rows)]
  norm = np.linalg.norm(weight, axis=1, keepdims=True)
  np.testing.assert_allclose(weight / norm, centers, atol=1e-6)
  np.testing.assert_allclose(norm, 0.01 * 324**0.5, rtol=1e-5)
  assert_same(state.params['encoder'], program.init_encoder())


def test_released_weights_start_training(run, config, tmp_path):
  config.model.activation = 'quick_gelu'
  model = models.make(config.model)
  variables = jax.jit(model.init)(jax.random.key(9), images(28))
  export.to_huggingface(tmp_path, model, variables)
  config.model.init_from = str(tmp_path)
  config.model.embedding_dim = 16
  state, program = state_of(config, run)
  encoder = dict(state.params['encoder'])
  expected = dict(variables['params'])
  fresh = encoder.pop('projection')
  assert_same(fresh, program.init_encoder()['projection'])
  del expected['projection']
  assert_same(encoder, expected)


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'init_from': 'clip'}, 'its width is 20.*set model.variant'),
    ({'init_from': 'dinov2'}, 'embedders only; start from'),
    ({'init_from': 'siglip'}, 'embedders only; start from'),
    ({'activation': 'quick_gelu'}, "its activation is 'gelu'"),
    ({'embedding_dim': 16, 'init_classifier': 'kept'}, r'class centers \['),
    ({'init_classifier': 'centers'}, '324 columns, model.embedding_dim=32'),
    ({'init_from': '/none', 'init_classifier': 'kept'}, 'no such folder'),
  ],
)
def test_weights_that_do_not_fit_are_refused(run, config, changes, says):
  config.model.init_from = str(run)
  config.model.update(changes)
  if (GOLDENS / config.model.init_from).is_dir():
    config.model.init_from = str(GOLDENS / config.model.init_from)
  with pytest.raises(errors.UserError, match=says):
    state_of(config, run)
