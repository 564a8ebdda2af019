"""The cluster stage with views: centers, labels, restarts, refusals."""

import json

import jax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax.cluster import labels as labels_lib
from mlcd_jax.cluster import split
from mlcd_jax.cluster import stage
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors

DIM, NUM_VIEWS = 16, 3
SHARDS = (70, 0, 33, 57)  # The second has bad images alone.


def make_rows():
  """Images around the first 4 axes and their views around the other 12."""
  rng = np.random.default_rng(0)
  axes = np.concatenate(
    [
      rng.integers(4, size=(sum(SHARDS), 1)),
      rng.integers(4, DIM, size=(sum(SHARDS), NUM_VIEWS)),
    ],
    axis=1,
  )
  rows = np.eye(DIM)[axes] + 0.1 * rng.normal(size=(*axes.shape, DIM))
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  rows[100, 1] = 0  # A view is zero,
  rows[101, 1:] = 0  # and all of one image.
  return rows.astype(np.float16)


@pytest.fixture(name='embedded')
def fixture_embedded(tmp_path):
  folder = tmp_path / 'embeddings'
  manifest = manifests.open_for('embed', folder, config={}, inputs={})
  views, rows, start = shards.views_folder(folder), make_rows(), 0
  for shard, count in enumerate(SHARDS):
    part = rows[start : start + count]
    keys = [f'{i:04d}' for i in range(start, start + count)]
    shards.write_views(views, shard, rows=part[:, 1:], keys=keys)
    shards.write_shard(
      folder,
      shard,
      rows=part[:, 0],
      keys=keys,
      captions=[''] * count,
      notes={'bad': {}},
    )
    start += count
  manifest.finish(
    shard_rows=list(SHARDS),
    sha256=shards.read_sha256(folder, len(SHARDS)),
    views={
      'rows_per_image': NUM_VIEWS,
      'sha256': shards.read_sha256(views, len(SHARDS)),
    },
  )
  return manifest


def run(embedded, name, fit_on, rule, shape=(2, 1)):
  config = config_lib.default()
  config.cluster.update(
    dict(num_centers=12, iterations=8, num_labels=5, fit_on=fit_on, rule=rule)
  )
  folder = embedded.folder.parent / name
  manifest = manifests.open_for('cluster', folder, config={}, inputs={})
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  stage.run(config, manifest, embedded=embedded, mesh=mesh)
  return manifest


def content(manifest):
  """The digests of the arrays and the report of a clustering."""
  report = json.loads((manifest.folder / 'clustering.json').read_text())
  return manifest.result, report


def read(manifest):
  """The centers, labels and scores of a finished stage."""
  paths = (labels_lib.label_path, labels_lib.score_path)
  return np.load(manifest.folder / 'centers.npy'), *(
    np.concatenate(
      [np.load(path(manifest.folder, i)) for i in range(len(SHARDS))]
    )
    for path in paths
  )


def test_centers_of_views_and_their_union(embedded):
  manifest = run(embedded, 'clusters', 'views', 'views')
  centers, labels, scores = read(manifest)
  # Every center is of views: none lies on the axes of the images.
  assert (np.abs(centers).argmax(1) >= 4).all()
  report = content(manifest)[1]
  assert report['num_points'] == sum(SHARDS) * NUM_VIEWS
  assert report['skipped_rows'] == 4
  views = make_rows()[:, 1:].astype(np.float32)
  cosines = views @ centers.T
  for i, row in enumerate(cosines):
    best = {int(r.argmax()): float(r.max()) for r in sorted(row, key=np.max)
            if r.any()}  # fmt: skip
    expected = sorted(best, key=lambda c: -best[c])
    missing = 5 - len(expected)
    assert labels[i].tolist() == expected + [-1] * missing
    np.testing.assert_allclose(
      scores[i], [best[c] for c in expected] + [0] * missing, atol=2e-3
    )
  assert labels.dtype == np.int32 and scores.dtype == np.float16
  assert (labels[101] == -1).all()


def test_the_two_choices_do_not_depend_on_each_other(embedded):
  of_images = read(run(embedded, 'a', 'images', 'views'))
  assert (np.abs(of_images[0]).argmax(1) < 4).all()
  assert (of_images[1][:, 3:] == -1).all()
  centers, labels, _ = read(run(embedded, 'b', 'views', 'nearest'))
  assert (np.abs(centers).argmax(1) >= 4).all()
  cosines = make_rows()[:, 0].astype(np.float32) @ centers.T
  np.testing.assert_array_equal(labels[:, 0], cosines.argmax(1))
  assert (labels >= 0).all()


@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_labels_are_the_same_on_every_mesh(embedded, shape):
  expected = run(embedded, 'a', 'views', 'views')
  found = embedded.folder.parent / 'b'
  found.mkdir()
  # From the same centers: fits agree across meshes up to rounding only.
  for name in ('centers.npy', 'clustering.json', manifests.NAME):
    (found / name).write_bytes((expected.folder / name).read_bytes())
  np.testing.assert_equal(
    read(run(embedded, 'b', 'views', 'views', shape)), read(expected)
  )


def test_a_stage_killed_between_shards_goes_on(embedded, monkeypatch):
  expected = run(embedded, 'a', 'views', 'views')
  rule, streams = stage.rules.RULES['views'], []

  def killed(images, *args, **options):
    streams.append(images)
    pieces = rule(images, *args, **options)
    # The first shard's images, and a part of the third's.
    yield from stage.rules.recut(pieces, [SHARDS[0], 5], 5)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setitem(stage.rules.RULES, 'views', killed)
    with pytest.raises(KeyboardInterrupt):
      run(embedded, 'b', 'views', 'views')
  assert len(streams) == 1  # All shards are one stream.
  folder = embedded.folder.parent / 'b'
  assert labels_lib.label_path(folder, 1).exists()
  assert not labels_lib.label_path(folder, 2).exists()
  kept = labels_lib.label_path(folder, 0).stat().st_mtime_ns
  assert content(run(embedded, 'b', 'views', 'views')) == content(expected)
  assert labels_lib.label_path(folder, 0).stat().st_mtime_ns == kept


def test_views_of_one_image_have_hashes_of_their_own(embedded):
  rows, views = shards.open_made(embedded), shards.open_views(embedded)
  hashes = split.row_hashes(views, 0)
  assert len(set(hashes)) == sum(SHARDS) * NUM_VIEWS
  assert not set(hashes) & set(split.row_hashes(rows, 0))


def test_changed_or_absent_views_are_refused(embedded):
  path = shards.row_path(embedded.folder.parent / 'views', 0)
  np.save(path, np.ones((210, DIM), np.float16))
  with pytest.raises(errors.UserError, match='img_emb_00000.npy: missing or'):
    run(embedded, 'a', 'images', 'views')
  del embedded.result['views']
  for choices in (('images', 'views'), ('views', 'nearest')):
    with pytest.raises(errors.UserError, match='embed.views: .*without views'):
      run(embedded, 'b', *choices)
  run(embedded, 'c', 'images', 'nearest')


def test_fewer_images_than_labels_are_refused(embedded):
  config = config_lib.default()
  config.cluster.num_centers = 0
  stage.check(config, embedded)
  config.cluster.num_labels = sum(SHARDS) + 1
  with pytest.raises(errors.UserError, match='num_labels=161 .* 160 images'):
    stage.check(config, embedded)


def test_the_number_of_centers_follows_the_images(embedded):
  config = config_lib.default()
  config.cluster.update(dict(num_centers=0, iterations=2, num_labels=3))
  folder = embedded.folder.parent / 'chosen'
  manifest = manifests.open_for('cluster', folder, config={}, inputs={})
  stage.run(config, manifest, embedded=embedded, mesh=sharding.make_mesh(2, 1,
            devices=jax.devices()[:2]))  # fmt: skip
  assert manifest.result['num_centers'] == len(read(manifest)[0]) == 40
  assert config.cluster.num_centers == 0


def test_labels_of_no_image_are_refused(embedded):
  # One center without the mean of the centers is nothing.
  config = config_lib.default()
  config.cluster.update(
    dict(num_centers=1, iterations=2, num_labels=1, rule='pursuit')
  )
  folder = embedded.folder.parent / 'one'
  manifest = manifests.open_for('cluster', folder, config={}, inputs={})
  with pytest.raises(errors.UserError, match='rule=pursuit: no image gets'):
    stage.run(config, manifest, embedded=embedded, mesh=sharding.make_mesh(2, 1,
              devices=jax.devices()[:2]))  # fmt: skip
