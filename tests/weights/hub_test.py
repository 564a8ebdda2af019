"""Every kind of folder with an encoder goes wherever one is named."""

import json
import pathlib
import shutil

import flax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import models
from mlcd_jax import sharding
from mlcd_jax.embed import encoder
from mlcd_jax.evaluate import encoders as evaluate_encoders
from mlcd_jax.runtime import errors
from mlcd_jax.weights import configs
from mlcd_jax.weights import hub
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import pinned as pinned_lib
from mlcd_jax.weights import preprocessing

GOLDENS = pathlib.Path(__file__).parent.parent / 'goldens'


def siglip(folder):
  """A folder whose preprocessing is not this project's own."""
  shutil.copytree(GOLDENS / 'siglip', folder)
  shutil.copy(GOLDENS / 'preprocessing_siglip' / preprocessing.NAME, folder)
  return folder


def imported(folder):
  load_lib.import_(str(siglip(folder / 'from')), folder / 'to')
  return folder / 'to'


FOLDERS = {
  'transformers': siglip,
  'open_clip': lambda folder: GOLDENS / 'open_clip',
  'imported': imported,
}


@pytest.mark.parametrize('name', FOLDERS)
def test_every_folder_is_scored_embeds_starts_runs_and_is_imported(
  name, tmp_path
):
  folder = str(FOLDERS[name](tmp_path / 'a'))
  open_clips = name == 'open_clip'
  model, variables, workdir = load_lib.load(folder, 'model.init_from')
  assert workdir is None
  assert model.pooling == ('class_token' if open_clips else 'attention')

  mesh = sharding.make_mesh()
  assert evaluate_encoders.identity(folder)['weights']
  scored = evaluate_encoders.load(folder, mesh)
  prepare = load_lib.load_preprocessing(folder, 'x')
  assert scored.prepare == prepare
  assert prepare.shorter_side == (21 if open_clips else 0)
  assert scored.image_size == (21 if open_clips else 24)
  assert not scored.text_path

  pinned_lib.check(pinned_lib.pin(folder, 'embed.path'), 'embed.path')
  embeds = encoder.Huggingface(
    folder, image_size=0, batch_size=1, dtype='float32'
  )
  assert embeds.prepare == prepare

  load_lib.import_(folder, tmp_path / 'copy')
  again, copied, _ = load_lib.load(str(tmp_path / 'copy'), 'x')
  assert again == model
  kernel = variables['params']['block_01']['mlp_in']['kernel']
  np.testing.assert_array_equal(
    copied['params']['block_01']['mlp_in']['kernel'], kernel
  )
  assert load_lib.load_preprocessing(str(tmp_path / 'copy'), 'x') == prepare


def test_weights_say_which_of_two_configs_counts(tmp_path):
  """As OpenCLIP's own folders on the hub have them."""
  shutil.copytree(GOLDENS / 'open_clip', tmp_path / 'a')
  shutil.copy(GOLDENS / 'clip/config.json', tmp_path / 'a')
  assert configs.read(tmp_path / 'a')[0] == 'open_clip'
  assert set(pinned_lib.pin(str(tmp_path / 'a'), 'embed.path')['weights']) == {
    'config.json',
    'open_clip_config.json',
    'open_clip_model.safetensors',
  }
  shutil.copy(GOLDENS / 'clip/model.safetensors', tmp_path / 'a')
  assert configs.read(tmp_path / 'a')[0] == 'clip'
  assert load_lib.load(str(tmp_path / 'a'), 'x')[0].depth == 2


def test_open_clips_features_are_scored():
  folder = str(GOLDENS / 'open_clip')
  golden = np.load(GOLDENS / 'open_clip/golden.npz')
  images = golden['0/images']
  scored = evaluate_encoders.load(folder, sharding.make_mesh())
  found = scored.encode(np.concatenate([images] * 4))[:2]
  np.testing.assert_allclose(found, golden['0/pooler_output'], atol=1e-4)


def test_a_changed_copy_is_not_what_was_pinned(tmp_path):
  folder = imported(tmp_path)
  pinned = pinned_lib.pin(str(folder), 'embed.path')
  assert 'model.json' in pinned['weights']
  path = folder / 'model.json'
  path.write_text(path.read_text() + ' ')
  with pytest.raises(errors.UserError, match='embed.path=.*are not those'):
    pinned_lib.check(pinned, 'embed.path')


def nothing(folder):
  folder.mkdir()
  return folder


def pictures(folder):
  folder.mkdir()
  for i in range(6):
    (folder / f'{i}.jpg').touch()
  return folder


def file(folder):
  return GOLDENS / 'clip/model.safetensors'


def pickled(folder):
  shutil.copytree(GOLDENS / 'clip', folder)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  return folder


def around(folder):
  shutil.copytree(GOLDENS / 'clip', folder / 'inside')
  return folder


def hub_cache(folder):
  shutil.copytree(GOLDENS / 'clip', folder / 'snapshots/0123')
  return folder


def with_config(**config):
  def make(folder):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    return folder

  return make


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (nothing, 'an empty folder; name a workdir.*OpenCLIP.*ORG/NAME'),
    (pictures, r'only 0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more; name a workdir'),
    (file, 'a file; name the folder it is in'),
    (pickled, 'pickled weights are not read'),
    (around, 'no encoder there, but in .*inside; name a workdir'),
    (hub_cache, 'no encoder there, but in .*snapshots/0123'),
    (with_config(architecture='vit'), "is timm's, whose models are not read"),
    (with_config(model={}, train={}), 'a workdir in which nothing is trained'),
    (with_config(model_type='resnet'), "model_type='resnet' is unknown"),
    (with_config(), "model_type='None' is unknown; use one of: clip"),
  ],
)
def test_other_folders_are_described(make, says, tmp_path):
  folder = str(make(tmp_path / 'a'))
  for use in (
    evaluate_encoders.identity,
    lambda path: load_lib.load(path, 'model.init_from'),
    lambda path: pinned_lib.pin(path, 'embed.path'),
    lambda path: load_lib.import_(path, tmp_path / 'b'),
  ):
    with pytest.raises(errors.UserError, match=says) as e:
      use(folder)
    assert '\n' not in str(e.value) and folder in str(e.value)
  assert not (tmp_path / 'b').exists()


def test_resnets_are_kept_and_loaded_too(tmp_path):
  config = config_lib.default().model
  config.update(variant='resnet_nano', image_size=32, pooling='average')
  model = models.make(config)
  shapes = huggingface.shapes(model)
  parameters = ((path, np.ones(shape, 'f4')) for path, shape in shapes.items())
  load_lib.save(tmp_path, model, parameters, source='a run')
  again, variables, _ = load_lib.load(str(tmp_path), 'x')
  assert again == model
  found = flax.traverse_util.flatten_dict(variables['params'], sep='/')
  assert {path: x.shape for path, x in found.items()} == shapes


def test_downloads_may_lie_in_a_folder_called_checkpoints(tmp_path):
  folder = siglip(tmp_path / 'checkpoints/siglip')
  assert hub.find(str(folder), 'x') == (hub.RELEASED, folder)


def test_a_home_is_expanded(monkeypatch):
  monkeypatch.setenv('HOME', str(GOLDENS))
  assert hub.find('~/clip', 'x') == (hub.RELEASED, GOLDENS / 'clip')
