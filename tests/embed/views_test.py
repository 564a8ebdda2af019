"""The views of images: their rows, files, restarts and bad images."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlcd_jax import manifests
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.data import views as views_lib
from mlcd_jax.embed import embedders
from mlcd_jax.embed import encoder
from mlcd_jax.embed import shards
from mlcd_jax.embed import stage as embed
from mlcd_jax.runtime import errors
from tests.embed import stage_test

GRIDS, NUM_VIEWS = (1, 2), 5


@pytest.fixture(name='config')
def fixture_config(tiny_config):
  tiny_config.data.split = 'train[:50]'
  tiny_config.embed.shard_rows = 20
  tiny_config.embed.views = GRIDS
  return tiny_config


@pytest.fixture(name='made')
def fixture_made(config, tmp_path):
  manifest = stage_test.new_manifest(tmp_path / 'embeddings')
  embed.run(config, manifest)
  return manifest


def images_of(prepare, source):
  """The images and their views, uint8 [50, 1 + V, S, S, 3]."""
  decoded = [transforms.decode(source[i]['image']) for i in range(50)]
  return np.stack([views_lib.prepare(p, GRIDS, prepare) for p in decoded])


def test_rows_are_those_of_the_crops(made, config):
  source, hog = sources.make(config.data), embedders.Hog(28)
  images = images_of(hog.prepare, source)
  features = hog.features(images.reshape(-1, 28, 28, 3))
  # The mean is that of all that is embedded.
  np.testing.assert_allclose(made.notes['mean'], features.mean(0), atol=1e-6)
  rows = features - features.mean(0)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  rows = rows.reshape(50, 1 + NUM_VIEWS, -1)
  np.testing.assert_allclose(shards.open_made(made)[:], rows[:, 0], atol=1e-3)
  views = shards.open_views(made)
  assert views.shape == (50 * NUM_VIEWS, 324)
  assert views.rows_per_image == NUM_VIEWS
  assert views.shard_rows == [20 * NUM_VIEWS, 20 * NUM_VIEWS, 10 * NUM_VIEWS]
  np.testing.assert_allclose(
    views[:].reshape(50, NUM_VIEWS, -1), rows[:, 1:], atol=1e-3
  )
  # A grid of one is the whole image.
  np.testing.assert_array_equal(
    views[:][::NUM_VIEWS], shards.open_made(made)[:]
  )


def test_metadata_has_the_key_and_the_number_of_each_view(made, config):
  folder = made.folder.parent / 'views'
  table = pq.read_table(folder / 'metadata/metadata_00001.parquet')
  keys = [sources.make(config.data)[i]['key'] for i in range(20, 40)]
  assert table['key'].to_pylist() == np.repeat(keys, NUM_VIEWS).tolist()
  assert table['view'].to_pylist() == list(range(NUM_VIEWS)) * 20
  assert table['image_path'] == table['key']
  assert set(made.result['views']['sha256']) == {
    str(path.relative_to(folder)) for path in folder.glob('*/*')
  }


@pytest.mark.parametrize('num_devices', [8, 1])
def test_a_call_of_a_model_may_hold_less_than_an_image(
  config, tmp_path, monkeypatch, num_devices
):
  devices = embed.jax.devices()[:num_devices]
  monkeypatch.setattr(embed.jax, 'local_devices', lambda: devices)
  config.embed.embedder = 'huggingface'
  config.embed.path = str(stage_test.CLIP)
  manifest = stage_test.clip_manifest(tmp_path / 'embeddings')
  embed.run(config, manifest)
  clip = encoder.Huggingface(
    config.embed.path, image_size=0, batch_size=4, dtype='float32'
  )
  # Five images and their views in a call, or one in two calls.
  assert clip.batch_rows == 4 * num_devices
  images = images_of(clip.prepare, sources.make(config.data))
  expected = clip(images.reshape(-1, *images.shape[2:]))
  expected = expected.reshape(50, 1 + NUM_VIEWS, -1)
  views = shards.open_views(manifest)[:].reshape(50, NUM_VIEWS, -1)
  # Up to the rounding of float16.
  np.testing.assert_allclose(
    shards.open_made(manifest)[:], expected[:, 0], atol=1e-3
  )
  np.testing.assert_allclose(views, expected[:, 1:], atol=1e-3)


@pytest.mark.parametrize('lost', ['embeddings', 'views'])
def test_a_shard_is_made_again_where_one_of_its_files_lacks(made, config, lost):
  workdir = made.folder.parent
  before = stage_test.read_all(workdir)
  kept = shards.row_path(workdir / 'views', 0)
  written = kept.stat().st_mtime_ns
  shards.row_path(workdir / lost, 1).unlink()
  made.complete = False
  made.save()
  embed.run(config, stage_test.new_manifest(made.folder))
  assert stage_test.read_all(workdir) == before
  assert kept.stat().st_mtime_ns == written


def test_a_stage_killed_between_shards_goes_on(made, config, tmp_path):
  folder = tmp_path / 'killed' / 'embeddings'
  write, calls = shards.write_shard, []

  def killed(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:  # The views of the second shard are written.
      raise KeyboardInterrupt
    write(*args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, 'write_shard', killed)
    with pytest.raises(KeyboardInterrupt):
      embed.run(config, stage_test.new_manifest(folder))
  assert shards.row_path(folder.parent / 'views', 1).exists()
  assert not shards.row_path(folder, 1).exists()
  # A file of a process that is gone.
  leftover = folder.parent / 'views/img_emb/.img_emb_00001.npy.0.tmp'
  leftover.write_bytes(b'half')
  manifest = stage_test.new_manifest(folder)
  embed.run(config, manifest)
  assert not leftover.exists()
  found = stage_test.read_all(folder.parent)
  assert found == {
    path: content
    for path, content in stage_test.read_all(made.folder.parent).items()
    if not str(path).startswith('killed')
  }
  assert manifest.result == made.result


def test_bad_images_have_no_rows_in_either(config, tmp_path, monkeypatch):
  source = sources.make(config.data)

  class Broken:
    def __len__(self):
      return len(source)

    def __getitem__(self, index):
      broken = index == 4 or index >= 40
      return source[index] | ({'image': b'not one'} if broken else {})

  monkeypatch.setattr(embed.sources, 'make', lambda data: Broken())
  config.data.max_bad_fraction = 0.5
  manifest = stage_test.new_manifest(tmp_path / 'embeddings')
  embed.run(config, manifest)
  assert manifest.result['bad'] == {'not an image': 11}
  assert manifest.result['shard_rows'] == [19, 20, 0]
  rows, views = shards.open_made(manifest), shards.open_views(manifest)
  assert views.shard_rows == [95, 100, 0]
  np.testing.assert_array_equal(rows.keys().repeat(NUM_VIEWS), views.keys())


def test_changed_or_absent_views_are_refused(made, config, tmp_path):
  path = shards.row_path(made.folder.parent / 'views', 2)
  np.save(path, np.zeros((50, 324), np.float16))
  with pytest.raises(errors.UserError, match='views.*delete .*embeddings to'):
    shards.open_views(made)
  path.unlink()
  with pytest.raises(errors.UserError, match='img_emb_00002.npy: missing'):
    shards.open_views(made)
  config.embed.views = ()
  without = stage_test.new_manifest(tmp_path / 'without/embeddings')
  embed.run(config, without)
  assert not (tmp_path / 'without/views').exists()
  assert 'views' not in without.result
  with pytest.raises(errors.UserError, match='embed.views: .* without views'):
    shards.open_views(manifests.load(without.folder))
