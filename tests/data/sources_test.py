"""Every source gives the same records, and runs the whole job."""

import json
import os

import fsspec
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import stages
from mlcd_jax.data import sources
from mlcd_jax.data import tar_index
from mlcd_jax.runtime import errors
from tests.data import shards

_PATHS = {
  'tfds': 'mlcd_test_pictures',
  'webdataset': '{}/tars/{{00000..00001}}.tar',
  'folder': '{}/folder',
  'array_record': '{}/array_record',
  'parquet': '{}/parquet/*.parquet',
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """The same pictures in every layout."""
  root = tmp_path_factory.mktemp('data')
  for name in ('tars', 'folder', 'array_record', 'parquet'):
    (root / name).mkdir()
  shards.MlcdTestPictures(
    data_dir=root / 'tfds', file_format='array_record'
  ).download_and_prepare()
  shards.img2dataset(root / 'tars')
  shards.class_folders(root / 'folder')
  shards.array_record(root / 'array_record/a.array_record')
  shards.parquet(root / 'parquet/train-00000-of-00001.parquet')
  return root


def _config(root, source):
  config = config_lib.default()
  config.data.source = source
  config.data.path = _PATHS[source].format(root)
  config.data.data_dir = str(root / 'tfds')
  config.data.cache_dir = str(root / 'cache')
  return config


@pytest.mark.parametrize('source', _PATHS)
def test_records(root, source):
  opened = sources.make(_config(root, source).data)
  assert len(opened) == (72 if source == 'webdataset' else 80)
  assert opened.num_classes == shards.NUM_CLASSES
  keys = opened.keys()
  assert keys.dtype.kind == 'S' and len(set(keys.tolist())) == len(opened)
  numbers = []
  pictures = {shards.jpeg(number): number for number in range(80)}
  for row in range(len(opened)):
    record = opened[row]
    number = pictures[record['image']]
    numbers.append(number)
    assert record['key'].encode() == keys[row]
    assert record['label'] == number % shards.NUM_CLASSES
    if source != 'folder':
      assert record['caption'] == shards.caption(number)
  if source == 'webdataset':  # Failed downloads have no record.
    assert numbers == [n for n in range(80) if n % 10 != 9]
  elif source not in ('folder', 'tfds'):
    assert numbers == list(range(80))


@pytest.mark.parametrize('source', _PATHS)
def test_whole_job(root, source, tmp_path):
  config = _config(root, source)
  config.embed.shard_rows = 32
  config.cluster.num_centers = 16
  config.cluster.iterations = 2
  config.model.variant = 'Pico/14'
  config.model.image_size = 28
  config.model.embedding_dim = 16
  config.model.pooling = 'average'
  config.model.dtype = 'float32'
  config.train.steps = 3
  config.train.batch_size = 16
  config.train.log_every_steps = 1
  config.evaluate.tasks = ('knn',)
  config.evaluate.batch_size = 32
  config_lib.add_dataset(config, 'pictures', test_split='train')
  stages.run(config, tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  assert any(name.startswith('trained/pictures/knn') for name in results)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  last = json.loads(lines[-1])
  assert last['step'] == 3
  assert last['train/images_without_labels'] == 0
  assert 0 <= last['train/data_wait_fraction'] <= 1


def test_split_in_path(root, tmp_path):
  for split, labels in (('train', (0, 1, 2)), ('test', (0, 2))):
    for label in labels:
      folder = tmp_path / split / f'class{label}'
      folder.mkdir(parents=True)
      (folder / '0.jpg').write_bytes(shards.jpeg(label))
  data = _config(root, 'folder').data
  data.path = f'{tmp_path}/{{split}}'
  test = sources.make(data, 'test')
  assert test.num_classes == 3
  assert [test[i]['label'] for i in range(2)] == [0, 2]
  assert test.keys().tolist() == [b'class0/0.jpg', b'class2/0.jpg']


def test_flat_folder_has_no_labels(root, tmp_path):
  (tmp_path / 'sub').mkdir()
  for name in ('b.jpg', 'a.PNG', 'sub/c.webp', '.hidden.jpg', 'notes.txt'):
    (tmp_path / name).write_bytes(shards.jpeg(0))
  data = _config(root, 'folder').data
  data.path = str(tmp_path)
  source = sources.make(data)
  assert source.keys().tolist() == [b'a.PNG', b'b.jpg', b'sub/c.webp']
  assert source.num_classes == 0
  assert source[0]['label'] == -1


@pytest.mark.parametrize(
  'source', ['webdataset', 'folder', 'array_record', 'parquet']
)
def test_fsspec_url(root, source):
  memory = fsspec.filesystem('memory')
  name = {'webdataset': 'tars'}.get(source, source)
  memory.put(str(root / name), f'/{name}', recursive=True)
  local = sources.make(_config(root, source).data)
  data = _config(root, source).data
  data.path = data.path.replace(str(root), 'memory:/')
  remote = sources.make(data)
  assert remote.keys().tolist() == local.keys().tolist()
  assert [remote[i] for i in (0, 50)] == [local[i] for i in (0, 50)]
  if source == 'webdataset':  # Kept beside the tars, for all hosts.
    assert memory.exists('/tars/00000.tar.index.npz')


def test_index_is_kept_and_checked(root, tmp_path, monkeypatch):
  shards.img2dataset(tmp_path, num_shards=1)
  data = _config(root, 'webdataset').data
  data.path = f'{tmp_path}/*.tar'
  first = sources.make(data).keys().tolist()
  index = tmp_path / '00000.tar.index.npz'
  assert index.exists()

  with monkeypatch.context() as patch:
    patch.setattr(tar_index, 'build', None)  # Not called again.
    assert sources.make(data).keys().tolist() == first

  index.write_bytes(b'broken')
  assert sources.make(data).keys().tolist() == first

  shards.tar(tmp_path / '00000.tar', [('other.jpg', shards.jpeg(1))])
  assert sources.make(data).keys().tolist() == [b'other']


def test_index_goes_to_the_cache_where_the_data_is_read_only(
  root, tmp_path, monkeypatch
):
  tars, cache = tmp_path / 'tars', tmp_path / 'cache'
  tars.mkdir()
  shards.img2dataset(tars, num_shards=1)
  data = _config(root, 'webdataset').data
  data.path, data.cache_dir = str(tars), str(cache)
  write = tar_index.storage.write

  def read_only(path, content):
    if str(tars) in path:
      raise PermissionError(path)
    write(path, content)

  monkeypatch.setattr(tar_index.storage, 'write', read_only)
  sources.make(data)
  assert len(os.listdir(cache)) == 1
  monkeypatch.setattr(tar_index, 'build', None)
  assert len(sources.make(data)) == 36


@pytest.mark.parametrize(
  ('source', 'path', 'message'),
  [
    ('webdataset', '', 'data.path: name the files'),
    ('webdataset', '{}/none/*.tar', 'none/*.tar: no such file'),
    ('webdataset', '{}/tars/{{00000..00002}}.tar', '00002.tar: cannot be read'),
    ('webdataset', 'nope://x/*.tar', 'nope://x/*.tar: cannot be read'),
    ('folder', '{}/none', 'none: cannot be read (no such folder)'),
    ('folder', '{}/parquet', 'no image files'),
    ('parquet', '{}/folder', 'no such file'),
    ('tfds', 'no_such_name', 'not a TFDS data set'),
  ],
)
def test_wrong_path(root, source, path, message):
  data = _config(root, source).data
  data.path = path.format(root)
  with pytest.raises(errors.UserError) as e:
    sources.make(data)
  assert message in str(e.value)


@pytest.mark.parametrize('source', ['tfds', 'array_record', 'parquet'])
def test_wrong_image_key(root, source):
  data = _config(root, source).data
  data.image_key = 'img'
  with pytest.raises(errors.UserError, match='data.image_key=img.*image'):
    sources.make(data)


def test_img2dataset_parquet_leaves_out_failed_downloads(root, tmp_path):
  pq, pa = shards.pq, shards.pa
  table = pa.table(
    {
      'key': ['a', 'b', 'c'],
      'status': ['success', 'failed_to_download', 'success'],
      'jpg': [shards.jpeg(0), None, shards.jpeg(2)],
      'caption': ['x', None, None],
    }
  )
  pq.write_table(table, tmp_path / '0.parquet')
  data = _config(root, 'parquet').data
  data.path, data.image_key = str(tmp_path), 'jpg'
  source = sources.make(data)
  assert source.keys().tolist() == [b'a', b'c']
  assert source[1] == {
    'key': 'c',
    'image': shards.jpeg(2),
    'label': -1,
    'caption': '',
  }
  assert source.num_classes == 0


@pytest.mark.parametrize('source', ['webdataset', 'parquet', 'array_record'])
def test_files_of_the_same_name_in_two_folders(root, tmp_path, source):
  """As two runs of img2dataset, which both count from 0."""
  write = {
    'webdataset': lambda path, images: shards.tar(
      path, [(f'{i:09d}.jpg', image) for i, image in enumerate(images)]
    ),
    'parquet': lambda path, images: shards.parquet(path, images=images),
    'array_record': lambda path, images: shards.array_record(
      path, images=images
    ),
  }[source]
  suffix = 'tar' if source == 'webdataset' else source
  for number, folder in enumerate(('a', 'b')):
    (tmp_path / folder).mkdir()
    write(
      tmp_path / folder / f'0.{suffix}',
      [shards.jpeg(i) for i in range(3 * number, 3 * number + 3 - number)],
    )
  data = _config(root, source).data
  data.path = str(tmp_path / 'a')
  alone = sources.make(data).keys().tolist()
  data.path = f'{tmp_path}/*/0.{suffix}'
  both = sources.make(data)
  # The third has no namesake, and keeps its key.
  assert both.keys().tolist() == [
    b'a/0/' + alone[0], b'a/0/' + alone[1], alone[2],
    b'b/0/' + alone[0], b'b/0/' + alone[1],
  ]  # fmt: skip
  for i, key in enumerate(both.keys().tolist()):
    record = both[i]
    assert record['image'] == shards.jpeg(i) and record['key'] == key.decode()
  (tmp_path / 'bad.txt').write_bytes(b'./b/0/' + alone[1] + b'\n')
  data.bad_keys = str(tmp_path / 'bad.txt')
  left = sources.make(data)
  assert left.keys().tolist() == both.keys().tolist()[:4]


def test_names_that_are_no_utf8_or_long_have_one_spelling(root, tmp_path):
  names = [b'caf\xe9', 'e\u0301'.encode(), b'plain', b'x' * 100_000]
  members = [(os.fsdecode(n) + '.jpg', shards.jpeg(0)) for n in names]
  shards.tar(tmp_path / '0.tar', members)
  for name, image in members[:3]:
    (tmp_path / name).write_bytes(image)
  table = {'key': names, 'image': [image for _, image in members]}
  shards.pq.write_table(shards.pa.table(table), tmp_path / '0.parquet')
  for source, ending in (('webdataset', b''), ('parquet', b''),
                         ('folder', b'.jpg')):  # fmt: skip
    data = _config(root, source).data
    data.path = str(tmp_path)
    opened = sources.make(data)
    keys = opened.keys()
    found = {key.removesuffix(ending) for key in keys.tolist()}
    assert found >= {rb'caf\xe9', 'é'.encode(), b'plain'}
    assert len(found) == len(opened) == (3 if source == 'folder' else 4)
    assert keys.itemsize <= 255
    for i, key in enumerate(keys):
      record = opened[i]
      assert record['key'].encode() == key and record['key'].isprintable()
      assert record['image'] == shards.jpeg(0)


@pytest.mark.parametrize(
  ('column', 'expected'),
  [
    (['./a', None, 'é'], [b'a', b'0-000000001', 'é'.encode()]),
    ([10, 11, None], [b'10', b'11', b'0-000000002']),
    (shards.pa.array(['a', 'b', 'c']).dictionary_encode(), [b'a', b'b', b'c']),
    (shards.pa.array(['a', '', 'c'], shards.pa.large_string()),
     [b'a', b'0-000000001', b'c']),
  ],
)  # fmt: skip
def test_parquet_keys_of_all_types(root, tmp_path, column, expected):
  table = {'key': column, 'image': [shards.jpeg(i) for i in range(3)]}
  shards.pq.write_table(shards.pa.table(table), tmp_path / '0.parquet')
  data = _config(root, 'parquet').data
  data.path = str(tmp_path)
  source = sources.make(data)
  assert source.keys().tolist() == expected
  assert [source[i]['key'].encode() for i in range(3)] == expected


def test_many_tars_are_indexed_by_processes(root, tmp_path, monkeypatch):
  from mlcd_jax.data import webdataset

  monkeypatch.setattr(webdataset, '_BYTES_PER_PROCESS', 1)
  monkeypatch.setattr(webdataset.os, 'cpu_count', lambda: 2)
  shards.img2dataset(tmp_path, num_shards=3, per_shard=10)
  data = _config(root, 'webdataset').data
  data.path = str(tmp_path)
  keys = sources.make(data).keys()
  assert np.all(keys[1:] > keys[:-1]) and len(keys) == 27


def test_several_captions_are_lines(root, tmp_path):
  """As Flickr30k and COCO have them, five an image."""
  shards.tar(
    tmp_path / '0.tar',
    [('a.jpg', shards.jpeg(0)), ('a.txt', b'one\ntwo words')],
  )
  writer = shards.array_record_module.ArrayRecordWriter(
    str(tmp_path / '0.array_record'), 'group_size:1'
  )
  example = shards.tf_example_generated_pb2.Example()
  feature = example.features.feature
  feature['image'].bytes_list.value.append(shards.jpeg(0))
  feature['caption'].bytes_list.value.extend([b'one', b'two words'])
  writer.write(example.SerializeToString())
  writer.close()
  table = shards.pa.table(
    {'image': [shards.jpeg(0)] * 2, 'caption': [['one', 'two words'], None]}
  )
  shards.pq.write_table(table, tmp_path / '0.parquet')
  for source in ('webdataset', 'array_record', 'parquet'):
    data = _config(root, source).data
    data.path = str(tmp_path)
    found = sources.make(data)
    assert found[0]['caption'] == 'one\ntwo words', source
    assert not found.class_names
  assert found[1]['caption'] == ''


def test_captions_of_tfds_features():
  from mlcd_jax.data import tfds_features

  for found in (
    np.array([b'one', b'two words'], object),
    {'text': [b'one', b'two words'], 'id': [1, 2]},
    [b'one', b'two words'],
  ):
    assert tfds_features.caption(found) == 'one\ntwo words'
  assert tfds_features.caption(b'one') == 'one'


def test_classes_have_names_where_they_are_known(root):
  assert list(sources.make(_config(root, 'folder').data).class_names) == [
    f'class{i}' for i in range(shards.NUM_CLASSES)
  ]
  names = sources.make(config_lib.default().data).class_names
  assert len(names) == 10 and names[7] == 'seven'
