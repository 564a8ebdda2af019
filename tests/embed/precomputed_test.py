"""Embeddings made elsewhere: every layout, mixed texts, and what is refused."""

import json
import shutil

import fsspec
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlcd_jax import manifests
from mlcd_jax import stages
from mlcd_jax.cluster import split
from mlcd_jax.embed import precomputed
from mlcd_jax.embed import shards as shards_lib
from mlcd_jax.embed import stage as embed
from mlcd_jax.runtime import errors

SIZES = (5, 0, 7)
DIM = 6


def make_rows(seed=0, dtype=np.float16):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(n, DIM)).astype(dtype) for n in SIZES]


def keys_of(shard):
  return [f'{shard}-{i}' for i in range(SIZES[shard])]


def write_metadata(path, shard, *names):
  path.parent.mkdir(parents=True, exist_ok=True)
  keys = pa.array(keys_of(shard), pa.string())
  pq.write_table(pa.table({name: keys for name in names or ['key']}), path)


def clip_retrieval(folder, *names, texts=None, dtype=np.float16):
  rows = make_rows(dtype=dtype)
  for part, shards in (('img', rows), ('text', texts or [])):
    (folder / f'{part}_emb').mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(shards):
      np.save(folder / f'{part}_emb/{part}_emb_{i}.npy', x)
  for i in range(len(SIZES)):
    write_metadata(folder / f'metadata/metadata_{i}.parquet', i, *names)
  return rows


def plain(folder):
  rows = make_rows(dtype=np.float32)
  for i, x in enumerate(rows):
    np.save(folder / f'part{i}.npy', x)
    write_metadata(folder / f'part{i}.parquet', i)
  return rows


def plain_with_metadata_apart(folder):
  rows = make_rows()
  (folder / 'embeddings').mkdir()
  for i, x in enumerate(rows):
    np.save(folder / f'embeddings/pd.{i}.npy', x)
    write_metadata(folder / f'metadata/pd.{i}.parquet', i)
  return rows


def datacomp(folder, save=np.savez):
  rows = make_rows()
  for i, x in enumerate(rows):
    save(folder / f'{i}.npz', b32_img=x[:, :2], l14_img=x, l14_txt=-x)
    write_metadata(folder / f'{i}.parquet', i, 'uid', 'url')
  return rows


def datacomp_compressed(folder):
  return datacomp(folder, np.savez_compressed)


def parquet(folder, kind=None):
  rows = make_rows(dtype=np.float32)
  fixed = pa.list_(pa.float32(), DIM)
  for i, x in enumerate(rows):  # Other empty lists do not say their width.
    column = pa.array(x.tolist(), kind if kind and len(x) else fixed)
    table = pa.table({'key': pa.array(keys_of(i), pa.string()), 'x': column})
    pq.write_table(table, folder / f'{i}.parquet', row_group_size=3)
  return rows


def parquet_half(folder):
  rows = make_rows()
  for i, x in enumerate(rows):
    flat = pa.array(x.reshape(-1), pa.float16())
    column = pa.FixedSizeListArray.from_arrays(flat, DIM)
    keys = pa.array(keys_of(i), pa.string())
    pq.write_table(
      pa.table({'key': keys, 'x': column}), folder / f'{i}.parquet'
    )
  return rows


def config(path, **fields):
  c = dict(embedder='precomputed', path=str(path), column='', text_weight=0.0)
  return ml_collections.ConfigDict(c | fields)


def make(path, folder, **fields):
  """The finished stage's manifest, and its rows."""
  c = config(path, **fields)
  manifest = manifests.open_for(
    'embed',
    folder,
    config={f'embed.{k}': v for k, v in c.items()},
    inputs={},
  )
  embed.run(ml_collections.ConfigDict({'embed': c}), manifest)
  manifest = manifests.load(folder)
  return manifest, shards_lib.open_made(manifest)


@pytest.mark.parametrize(
  'write',
  [
    clip_retrieval,
    lambda folder: clip_retrieval(folder, 'image_path'),
    lambda folder: clip_retrieval(folder, 'key', dtype=np.float32),
    plain,
    plain_with_metadata_apart,
    datacomp,
    datacomp_compressed,
    parquet,
    lambda folder: parquet(folder, pa.list_(pa.float32())),
    parquet_half,
  ],
)
def test_every_layout_is_read_in_place(tmp_path, write):
  source = tmp_path / 'elsewhere'
  source.mkdir()
  expected = np.concatenate(write(source))
  before = {p: p.stat().st_mtime_ns for p in source.rglob('*')}
  manifest, rows = make(source, tmp_path / 'embeddings')
  assert rows.shape == (12, DIM)
  assert rows.shard_rows == manifest.result['shard_rows'] == list(SIZES)
  for start, stop in ((0, 12), (3, 7), (5, 5), (11, 12), (2, 4), (0, 2)):
    found = rows[start:stop]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected[start:stop])
  wanted = np.array([11, 0, 7, 7])
  np.testing.assert_array_equal(rows.take(wanted), expected[wanted])
  assert rows.keys().astype(str).tolist() == keys_of(0) + keys_of(2)
  assert rows.locate(6)[1] == 1 and '2' in rows.locate(6)[0]
  # Nothing but the manifest is written.
  assert [p.name for p in (tmp_path / 'embeddings').iterdir()] == [
    'manifest.json'
  ]
  assert {p: p.stat().st_mtime_ns for p in source.rglob('*')} == before


def test_urls_are_read_by_ranges(tmp_path):
  expected = np.concatenate(clip_retrieval(tmp_path / 'local'))
  memory = fsspec.filesystem('memory')
  memory.put(str(tmp_path / 'local'), '/embeddings_made', recursive=True)
  _, rows = make('memory://embeddings_made', tmp_path / 'embeddings')
  np.testing.assert_array_equal(rows[2:9], expected[2:9])
  wanted = np.array([9, 1, 1])
  np.testing.assert_array_equal(rows.take(wanted), expected[wanted])
  assert rows.keys().astype(str).tolist() == keys_of(0) + keys_of(2)


@pytest.mark.parametrize('weight', [0.25, 1.0])
@pytest.mark.parametrize('layout', ['clip-retrieval', 'datacomp'])
def test_texts_are_mixed_in_by_weight(tmp_path, weight, layout):
  texts = make_rows(seed=1)
  texts[0][1] = 0  # No text: the row is left out.
  if layout == 'datacomp':
    images = make_rows()
    for i, (x, t) in enumerate(zip(images, texts)):
      np.savez(tmp_path / f'{i}.npz', l14_img=x, l14_txt=t)
  else:
    images = clip_retrieval(tmp_path, texts=texts)
  _, rows = make(tmp_path, tmp_path / 'embeddings', text_weight=weight)

  def unit(shards):
    x = np.concatenate(shards).astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

  expected = (1 - weight) * unit(images) + weight * unit(texts)
  expected[1] = 0
  np.testing.assert_allclose(rows[:], expected, atol=1e-6)


def test_null_lists_are_zero_rows(tmp_path):
  column = pa.array([[1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32(), 2))
  pq.write_table(pa.table({'x': column}), tmp_path / 'a.parquet')
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  np.testing.assert_array_equal(rows[:], [[1, 2], [0, 0], [3, np.nan]])


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (lambda p: p.write_bytes(b''), 'img_emb_2.npy: empty'),
    (lambda p: p.write_bytes(b'x' * 999), 'img_emb_2.npy: cannot be read'),
    (lambda p: p.write_bytes(p.read_bytes()[:-2]), 'img_emb_2.npy: cut short'),
    (lambda p: np.save(p, np.zeros((7, 1, DIM), np.float16)),
     r'img_emb_2.npy: shape \(7, 1, 6\)'),
    (lambda p: np.save(p, np.zeros((7, 5), np.float16)),
     r'img_emb_2.npy: shape \(7, 5\), but .*img_emb_0.npy has 6 columns'),
    (lambda p: np.save(p, np.zeros((7, DIM), np.int8)), 'img_emb_2.npy: int8'),
    (lambda p: np.save(p, np.zeros((7, DIM), np.float32).T.copy().T),
     'img_emb_2.npy: .*by columns'),
    (lambda p: np.save(p, np.array([{}] * 7), allow_pickle=True),
     'img_emb_2.npy: '),
    (lambda p: shutil.rmtree(p.parent), 'no embeddings'),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, spoil, says):
  clip_retrieval(tmp_path / 'x')
  for path in (tmp_path / 'x/metadata').iterdir():
    path.unlink()
  spoil(tmp_path / 'x/img_emb/img_emb_2.npy')
  with pytest.raises(errors.UserError, match=says):
    precomputed.describe(config(tmp_path / 'x'))


@pytest.mark.parametrize(
  'kind', [pa.list_(pa.float32()), pa.large_list(pa.float64()),
           pa.list_(pa.float16())]
)  # fmt: skip
@pytest.mark.parametrize(
  'broken', [[None], [None, []], [[1.0, 2.0]], [[], None, [1.0, 2.0, 3.0, 4.0]]]
)
def test_lists_that_are_no_rows_are_zero_wherever_they_stand(
  tmp_path, kind, broken
):
  good = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
  for i, lists in enumerate(
    ([*broken, *good], [*good, *broken], [None] * 3, [], broken[:1] + good)
  ):
    table = pa.table({'x': pa.array(lists, kind)})
    pq.write_table(table, tmp_path / f'{i}.parquet', row_group_size=2)
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  zero = np.zeros((len(broken), 3))
  expected = [*zero, *good, *good, *zero, *zero[:1], *zero[:1], *zero[:1]]
  expected += [*zero[:1], *good]
  np.testing.assert_array_equal(rows[:], expected)
  assert rows.shard_rows == [3 + len(broken)] * 2 + [3, 0, 4]


def test_lists_of_all_lengths_are_no_embeddings(tmp_path):
  lists = pa.array([[1.0] * n for n in range(9)], pa.list_(pa.float32()))
  pq.write_table(pa.table({'x': lists}), tmp_path / '0.parquet')
  with pytest.raises(errors.UserError, match='lists of 1 to 8 numbers in x'):
    make(tmp_path, tmp_path / 'embeddings')


@pytest.mark.parametrize(
  'empty',
  [np.zeros((0, DIM), np.float16), np.zeros((0, 3)), np.zeros((0, 0)),
   np.array([])],
)  # fmt: skip
def test_files_of_no_rows_have_any_width(tmp_path, empty):
  for i, x in enumerate((empty, np.ones((2, DIM)), empty)):
    np.save(tmp_path / f'{i}.npy', x)
    keys = pa.array([f'{i}-{row}' for row in range(len(x))], pa.string())
    pq.write_table(pa.table({'key': keys}), tmp_path / f'{i}.parquet')
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  assert rows.shape == (2, DIM) and rows.shard_rows == [0, 2, 0]
  assert rows[:].dtype == np.float32 and (rows[:] == 1).all()
  assert rows.keys().tolist() == [b'1-0', b'1-1']
  assert len(split.row_hashes(rows, 0)) == 2
  np.save(tmp_path / '1.npy', empty)
  pq.write_table(pa.table({'key': keys}), tmp_path / '1.parquet')
  with pytest.raises(errors.UserError, match='0.npy: no rows, nor in any'):
    precomputed.describe(config(tmp_path))


@pytest.mark.parametrize(
  'caption', [pa.array([['a', 'b'], None]), pa.array([b'a\nb', None])]
)
def test_metadata_of_all_types(tmp_path, caption):
  np.save(tmp_path / '0.npy', np.ones((2, DIM)))
  keys = pa.array([b'caf\xe9', './é'.encode()], pa.binary())
  table = pa.table({'key': keys, 'caption': caption})
  pq.write_table(table, tmp_path / '0.parquet')
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  assert rows.metadata(np.arange(2)) == ([r'caf\xe9', 'é'], ['a\nb', ''])
  table = pa.table({'key': pa.array([[1], [2]])})
  pq.write_table(table, tmp_path / '0.parquet')
  with pytest.raises(errors.UserError, match='0.parquet: .*text, bytes or in'):
    rows.keys()


def test_columns_that_are_not_there_are_named(tmp_path):
  datacomp(tmp_path)
  with pytest.raises(errors.UserError, match='embed.column.*l14_img'):
    precomputed.describe(config(tmp_path, column='h14_img'))
  for path in tmp_path.glob('*.npz'):
    path.unlink()
  with pytest.raises(errors.UserError, match='no column with lists'):
    precomputed.describe(config(tmp_path))
  with pytest.raises(errors.UserError, match='embed.path=/no/such'):
    precomputed.describe(config('/no/such'))


def test_texts_that_are_not_there_are_named(tmp_path):
  clip_retrieval(tmp_path / 'a')
  with pytest.raises(errors.UserError, match='text_emb_0.npy: missing'):
    precomputed.describe(config(tmp_path / 'a', text_weight=0.5))
  (tmp_path / 'b').mkdir()
  plain(tmp_path / 'b')
  with pytest.raises(errors.UserError, match='embed.text_weight.*no text_emb'):
    precomputed.describe(config(tmp_path / 'b', text_weight=0.5))


def test_changed_files_are_noticed(tmp_path):
  clip_retrieval(tmp_path / 'x')
  manifest, _ = make(tmp_path / 'x', tmp_path / 'embeddings')
  path = tmp_path / 'x/img_emb/img_emb_0.npy'
  rows = np.load(path)
  np.save(path, rows[::-1])
  with pytest.raises(errors.UserError, match='img_emb_0.npy: new, missing or'):
    shards_lib.open_made(manifest)
  np.save(path, rows)
  np.save(path.with_name('img_emb_3.npy'), rows)
  with pytest.raises(errors.UserError, match='img_emb_3.npy: new, missing or'):
    shards_lib.open_made(manifest)
  path.with_name('img_emb_3.npy').unlink()
  shards_lib.open_made(manifest)


def test_large_files_are_compared_in_blocks_all_over(tmp_path):
  content = np.arange(2**20, dtype=np.float32)  # 4 MiB
  path = tmp_path / 'x.npy'
  seen = set()
  for place in (None, 0, 2**19, 2**20 - 1):
    changed = content.copy()
    if place is not None:
      changed[place] += 1
    path.write_bytes(changed.tobytes())
    seen.add(precomputed._fingerprint(str(path)))
  assert len(seen) >= 3  # Both ends are always looked at.


def test_rows_without_keys_find_no_images(tmp_path):
  np.save(tmp_path / 'x.npy', make_rows()[0])
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  assert not rows.has_keys
  with pytest.raises(errors.UserError, match='x.npy: no Parquet file with its'):
    rows.keys()
  pq.write_table(pa.table({'id': [1] * 5}), tmp_path / 'x.parquet')
  shutil.rmtree(tmp_path / 'embeddings')
  _, rows = make(tmp_path, tmp_path / 'embeddings')
  with pytest.raises(errors.UserError, match='x.parquet: no column key or'):
    rows.keys()


def test_the_manifest_points_to_the_folder(tmp_path, monkeypatch):
  clip_retrieval(tmp_path / 'x')
  monkeypatch.chdir(tmp_path)
  make('x', tmp_path / 'embeddings')
  content = json.loads((tmp_path / 'embeddings/manifest.json').read_text())
  assert content['result']['root'] == str(tmp_path / 'x')
  monkeypatch.chdir('/')  # It is found from any place.
  shards_lib.open_made(manifests.load(tmp_path / 'embeddings'))


def test_the_whole_job_by_keys(tiny_config, tmp_path):
  """Rows of our own embedder, moved, reordered and damaged."""
  tiny_config.evaluate.tasks = ('knn',)
  stages.run(tiny_config, tmp_path / 'own', ('embed',))
  own = shards_lib.Embeddings(tmp_path / 'own/embeddings', 3)
  rows, keys = own[:].astype(np.float32), own.keys().astype(str)
  order = np.random.default_rng(0).permutation(300)
  rows, keys = rows[order], keys[order]
  rows[[3, 200]] = [[0], [np.nan]]
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  for i, part in enumerate(np.split(np.arange(300), [120, 120])):
    np.savez(folder / f'{i}.npz', l14_img=rows[part])
    table = pa.table({'uid': pa.array(keys[part], pa.string())})
    pq.write_table(table, folder / f'{i}.parquet')
  # A repeated key and one that is null: the first counts, the other is none.
  np.savez(folder / '3.npz', l14_img=rows[:2])
  table = pa.table({'uid': pa.array([keys[5], None], pa.large_string())})
  pq.write_table(table, folder / '3.parquet')

  tiny_config.embed.embedder = 'precomputed'
  tiny_config.embed.path = str(folder)
  stages.run(tiny_config, tmp_path / 'run')
  clusters = tmp_path / 'run/clusters'
  centers = np.load(clusters / 'centers.npy')
  labels = [np.load(clusters / f'labels_0000{i}.npy') for i in range(4)]
  assert [len(x) for x in labels] == [120, 0, 180, 2]
  labels = np.concatenate(labels)[:300]
  bad = [3, 200]
  assert (labels[bad] == -1).all()
  good = np.delete(np.arange(300), bad)
  unit = rows[good] / np.linalg.norm(rows[good], axis=1, keepdims=True)
  np.testing.assert_array_equal(
    labels[good, 0], (unit @ centers.T).argmax(axis=1)
  )
  figures = json.loads((clusters / 'clustering.json').read_text())
  assert figures['skipped_rows'] == 2
  lines = (tmp_path / 'run/metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['train/images_without_labels'] <= 2
  # A trained encoder, and no teacher to compare it with.
  results = json.loads((tmp_path / 'run/results.json').read_text())
  assert {name.partition('/')[0] for name in results} == {
    'trained', 'random', 'raw'
  }  # fmt: skip

  # Another run reads both in place; a changed file stops it.
  tiny_config.cluster.path = str(tmp_path / 'run')
  path = folder / '2.npz'
  path.write_bytes(path.read_bytes()[:-1] + b'x')
  with pytest.raises(errors.UserError, match='2.npz: new, missing or changed'):
    stages.run(tiny_config, tmp_path / 'shared', ('train',))
