"""The embed stage: rows, shards, restarts."""

import pathlib
import shutil

from huggingface_hub import constants
import jax
import numpy as np
import pytest

from mlcd_jax import manifests
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.embed import embedders
from mlcd_jax.embed import encoder
from mlcd_jax.embed import shards
from mlcd_jax.embed import stage as embed
from mlcd_jax.runtime import errors

CLIP = pathlib.Path(__file__).parent.parent / 'goldens/clip_with_text'


def new_manifest(folder, **fields):
  config = {'embedder': 'hog', 'image_size': 0, 'batch_size': 64} | fields
  config = {f'embed.{k}': v for k, v in config.items()}
  return manifests.open_for('embed', folder, config=config, inputs={})


def images_of(embedder, source):
  decoded = [transforms.decode(source[i]['image']) for i in range(300)]
  return np.stack([embedder.prepare(pixels) for pixels in decoded])


def read_all(folder):
  return {
    p.relative_to(folder): p.read_bytes()
    for p in folder.rglob('*')
    if p.suffix in ('.npy', '.parquet')
  }


@pytest.fixture(name='made')
def fixture_made(tiny_config, tmp_path):
  folder = tmp_path / 'embeddings'
  manifest = new_manifest(folder)
  embed.run(tiny_config, manifest)
  return folder, manifest


def test_rows_are_unit_and_centered_on_the_mean(made, tiny_config):
  folder, manifest = made
  rows = shards.Embeddings(folder, 3)
  assert rows.shape == (300, 324)
  assert rows.shard_rows == [100, 100, 100]
  norms = np.linalg.norm(rows[:].astype(np.float32), axis=1)
  np.testing.assert_allclose(norms, 1, atol=1e-3)
  source = sources.make(tiny_config.data)
  np.testing.assert_array_equal(rows.keys().astype('S'), source.keys())
  assert rows.metadata(np.array([3]))[1] == [source[3]['caption']]
  features = embedders.Hog(28).features(images_of(embedders.Hog(28), source))
  np.testing.assert_allclose(
    manifest.notes['mean'], features.mean(0), atol=1e-5
  )
  centered = features - features.mean(0)
  centered /= np.linalg.norm(centered, axis=1, keepdims=True)
  np.testing.assert_allclose(rows[:], centered, atol=1e-3)
  assert manifest.result['bad'] == {}


def test_finished_shards_are_kept_and_missing_ones_made(made, tiny_config):
  folder, manifest = made
  before = read_all(folder)
  kept = shards.row_path(folder, 0)
  written = kept.stat().st_mtime_ns
  shards.row_path(folder, 1).unlink()
  manifest.complete = False
  manifest.save()
  embed.run(tiny_config, new_manifest(folder))
  assert read_all(folder) == before
  assert kept.stat().st_mtime_ns == written


def test_hosts_share_the_shards_and_write_the_same(
  made, tiny_config, tmp_path, monkeypatch
):
  folder = tmp_path / 'two_hosts'
  monkeypatch.setattr(embed.distributed, 'barrier', lambda name: None)
  monkeypatch.setattr(embed.distributed, 'decide', lambda name, value: value())
  monkeypatch.setattr(embed, '_summary', lambda *args: {})
  monkeypatch.setattr(embed.jax, 'process_count', lambda: 2)
  for host in (0, 1):
    monkeypatch.setattr(embed.jax, 'process_index', lambda h=host: h)
    manifest = new_manifest(folder)
    manifest.complete = False
    embed.run(tiny_config, manifest)
    assert len(read_all(folder)) == (4, 6)[host]
  assert read_all(folder) == read_all(made[0])


def test_bad_images_have_no_row_and_too_many_stop(
  tiny_config, tmp_path, monkeypatch
):
  source = sources.make(tiny_config.data)

  class Broken:
    num_classes = 10

    def __len__(self):
      return len(source)

    def __getitem__(self, index):
      record = source[index]
      return record | {'image': b'not one'} if index in (4, 104) else record

  monkeypatch.setattr(embed.sources, 'make', lambda data: Broken())
  manifest = new_manifest(tmp_path / 'a')
  embed.run(tiny_config, manifest)
  assert manifest.result['bad'] == {'not an image': 2}
  keys = shards.Embeddings(tmp_path / 'a', 3).keys()
  assert len(keys) == 298 and source.keys()[4] not in keys
  tiny_config.data.max_bad_fraction = 0.001
  with pytest.raises(errors.UserError, match='2 of 300 images are bad'):
    embed.run(tiny_config, new_manifest(tmp_path / 'b'))


def clip_manifest(folder, path=CLIP):
  return new_manifest(
    folder,
    embedder='huggingface',
    path=str(path),
    batch_size=4,
    dtype='float32',
  )


@pytest.fixture(name='clip_config')
def fixture_clip_config(tiny_config):
  tiny_config.embed.embedder = 'huggingface'
  tiny_config.embed.path = str(CLIP)
  tiny_config.embed.batch_size = 4
  return tiny_config


def make_clip(**fields):
  return encoder.Huggingface(
    str(CLIP),
    **dict(image_size=0, batch_size=4, dtype='float32') | fields,
  )


def test_huggingface_rows_are_the_projected_features(clip_config, tmp_path):
  manifest = clip_manifest(tmp_path)
  embed.run(clip_config, manifest)
  rows = shards.Embeddings(tmp_path, 3)
  assert rows.shape == (300, 6)
  embedder = make_clip()
  assert (embedder.image_size, embedder.batch_rows) == (21, 32)
  source = sources.make(clip_config.data)
  images = images_of(embedder, source)
  assert images.shape == (300, 21, 21, 3)
  np.testing.assert_array_equal(rows[:], embedder(images).astype(np.float16))
  golden = np.load(CLIP / 'golden.npz')
  expected = golden['0/image_embeds']
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(embedder(golden['0/images']), expected, atol=1e-5)
  # Batches of every size, but one program.
  assert embedder._encode._cache_size() == 1
  assert set(manifest.notes['weights']) == {'config.json', 'model.safetensors'}


def test_huggingface_rows_do_not_depend_on_the_devices(monkeypatch):
  images = np.random.default_rng(0).integers(0, 256, (40, 21, 21, 3), np.uint8)
  expected = make_clip()(images)
  monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])
  one = make_clip()
  assert one.batch_rows == 4
  np.testing.assert_array_equal(one(images), expected)


def test_huggingface_in_sixteen_bits_and_at_another_size():
  images = np.random.default_rng(0).integers(0, 256, (5, 21, 21, 3), np.uint8)
  cosine = (make_clip()(images) * make_clip(dtype='bfloat16')(images)).sum(1)
  assert cosine.min() > 1 - 1e-3
  larger = make_clip(image_size=42)
  assert larger.prepare(np.zeros((50, 90, 3), np.uint8)).shape == (42, 42, 3)
  assert larger(images.repeat(2, 1).repeat(2, 2)).shape == (5, 6)
  with pytest.raises(errors.UserError, match='embed.image_size=6 is less'):
    make_clip(image_size=6)


def test_huggingface_goes_on_and_refuses_other_weights(clip_config, tmp_path):
  weights = shutil.copytree(CLIP, tmp_path / 'clip')
  folder = tmp_path / 'embeddings'
  clip_config.embed.path = str(weights)
  embed.run(clip_config, clip_manifest(folder, weights))
  before = read_all(folder)

  def again():
    shards.row_path(folder, 1).unlink()
    manifest = clip_manifest(folder, weights)
    manifest.complete = False
    manifest.save()
    embed.run(clip_config, clip_manifest(folder, weights))

  again()
  assert read_all(folder) == before
  config = weights / 'config.json'
  config.write_text(config.read_text().replace('quick_gelu', 'gelu'))
  with pytest.raises(errors.UserError, match='not those the embeddings were'):
    again()


def test_a_name_is_kept_with_its_commit(clip_config, tmp_path, monkeypatch):
  commit = '0123456789abcdef0123456789abcdef01234567'
  cached = tmp_path / 'models--org--name'
  shutil.copytree(CLIP, cached / 'snapshots' / commit)
  (cached / 'refs').mkdir()
  (cached / 'refs/main').write_text(commit)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  clip_config.embed.path = 'org/name'
  clip_config.data.split = 'train[:20]'
  folder = tmp_path / 'embeddings'
  embed.run(clip_config, clip_manifest(folder, 'org/name'))
  assert manifests.load(folder).notes['path'] == f'org/name@{commit}'
  # It stays with that commit when the name moves on.
  (cached / 'refs/main').write_text('f' * 40)
  assert embedders.load_embedder(manifests.load(folder)).image_size == 21
