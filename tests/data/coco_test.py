"""COCO's published layout, in miniature."""

import json

import jax
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.data import coco
from mlcd_jax.data import sources
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import stage
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import problems
from tests.data import shards

_OUTLINE = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0]]
_CROWD = {'counts': [4, 5, 7], 'size': [4, 4]}
# As in COCO, ids have gaps; the file need not list them in order.
_CATEGORIES = [
  {'id': 18, 'name': 'dog', 'supercategory': 'animal'},
  {'id': 1, 'name': 'person', 'supercategory': 'person'},
  {'id': 90, 'name': 'toothbrush', 'supercategory': 'indoor'},
]


def annotation(number, image, category, iscrowd=0):
  return {
    'id': number,
    'image_id': image,
    'category_id': category,
    'iscrowd': iscrowd,
    'bbox': [1.0, 2.0, 3.0, 4.0],
    'area': 12.0,
    'segmentation': _CROWD if iscrowd else _OUTLINE,
  }


def write(root, split, images, annotations, categories=_CATEGORIES):
  """annotations/instances_SPLIT.json and SPLIT/ with a JPEG an image."""
  (root / 'annotations').mkdir(parents=True, exist_ok=True)
  (root / split).mkdir()
  listed = []
  for number in images:
    name = f'COCO_{split}_{number:012d}.jpg'
    (root / split / name).write_bytes(shards.jpeg(number))
    listed.append(
      {'id': number, 'file_name': name, 'height': 32, 'width': 40, 'license': 3}
    )
  path = root / 'annotations' / f'instances_{split}.json'
  content = {
    'info': {'year': 2014}, 'licenses': [], 'images': listed,
    'annotations': annotations, 'categories': categories,
  }  # fmt: skip
  path.write_text(json.dumps(content))
  return path


@pytest.fixture(name='root')
def fixture_root(tmp_path):
  """Four images: two dogs and a person, a crowd, nothing, a toothbrush."""
  root = tmp_path / 'coco'
  write(
    root,
    'val2014',
    (42, 9, 73, 25),
    [
      annotation(1, 9, 90),
      annotation(2, 42, 18),
      annotation(3, 42, 1),
      annotation(4, 42, 18),
      annotation(900, 25, 1, iscrowd=1),
    ],
  )
  return root


def open_split(root, split='val2014', **fields):
  config = config_lib.default()
  config.data.update(source='coco', path=str(root), **fields)
  return sources.make(config.data, split)


def test_labels_are_the_categories_of_all_annotations(root):
  source = open_split(root)
  assert source.num_attributes == 3 and source.num_classes == 0
  found = {
    source[i]['key']: source[i]['attributes'].tolist()
    for i in range(len(source))
  }
  # Person, dog, toothbrush; 73 has no annotation, and is no image of the set.
  assert found == {
    'COCO_val2014_000000000042.jpg': [0, 1],
    'COCO_val2014_000000000009.jpg': [2],
    'COCO_val2014_000000000025.jpg': [0],
  }
  assert source[1]['image'] == shards.jpeg(9)
  assert [key.decode() for key in source.keys()] == list(found)


def test_annotations_lie_by_image(root):
  found = coco.read(str(root / 'annotations/instances_val2014.json'))
  assert found.categories == ['person', 'dog', 'toothbrush']
  assert found.starts.tolist() == [0, 3, 4, 4, 5]
  assert found.category.tolist() == [0, 1, 1, 2, 0]
  assert found.names[3] == 'COCO_val2014_000000000025.jpg'


def test_images_that_were_not_fetched_are_bad(root):
  (root / 'val2014/COCO_val2014_000000000009.jpg').unlink()
  found = problems.Problems('data')
  config = config_lib.default()
  config.data.update(source='coco', path=str(root))
  assert len(sources.make(config.data, 'val2014', found)) == 2
  assert found.counts == {'no file': 1}
  with pytest.raises(errors.UserError, match='1 of 3 images are bad.*no file'):
    open_split(root)


def test_annotations_of_images_that_are_not_listed_are_nobodys(tmp_path):
  write(tmp_path, 'val2017', (1,), [annotation(1, 1, 18), annotation(2, 7, 1)])
  assert open_split(tmp_path, 'val2017')[0]['attributes'].tolist() == [1]


_FETCH = (
  'unpack http://images.cocodataset.org/annotations/annotations_trainval2014'
  '.zip and http://images.cocodataset.org/zips/val2014.zip in '
)


def break_annotations(root):
  (root / 'annotations/instances_val2014.json').unlink()


def break_images(root):
  for path in (root / 'val2014').iterdir():
    path.unlink()
  (root / 'val2014').rmdir()


def break_json(root):
  path = root / 'annotations/instances_val2014.json'
  path.write_text(path.read_text()[:-9])


def break_content(root):
  path = root / 'annotations/instances_val2014.json'
  path.write_text('{"images": [], "annotations": [{"caption": "a dog"}]}')


def break_category(root):
  path = root / 'annotations/instances_val2014.json'
  path.write_text(
    path.read_text().replace('"category_id": 90', '"category_id": 8')
  )


@pytest.mark.parametrize(
  'broken, says',
  [
    (break_annotations, 'instances_val2014.json: cannot be read'),
    (break_images, 'val2014: cannot be read'),
    (break_json, 'instances_val2014.json: cannot be read'),
    (break_content, 'no instances as COCO has them'),
    (break_category, 'no instances as COCO has them'),
  ],
)
def test_what_is_not_there_is_told_with_where_to_get_it(root, broken, says):
  broken(root)
  with pytest.raises(errors.UserError) as e:
    open_split(root)
  assert says in str(e.value) and _FETCH + str(root) in str(e.value)
  assert '\n' not in str(e.value)


def test_a_split_of_another_name(root):
  with pytest.raises(errors.UserError, match='COCO has the splits train2014'):
    open_split(root, 'train')


def test_by_name_it_is_a_data_set_of_several_labels(root, tmp_path):
  config = config_lib.default()
  config.evaluate.update(named=('coco',), data_dir=str(tmp_path))
  config.evaluate.update(tasks=('multi_label', 'knn'), batch_size=8)
  numbers = range(100, 130)
  config = datasets.with_named(config)
  with pytest.raises(
    errors.UserError,
    match='evaluate.datasets.coco.*train2014.zip in .*evaluate.data_dir',
  ):
    stage.open_sources(config)
  write(
    root,
    'train2014',
    numbers,
    [annotation(n, n, _CATEGORIES[n % 3]['id']) for n in numbers],
  )
  opened = stage.open_sources(config)
  colours = encoders.Encoder(8, lambda images: images.mean((1, 2)) / 99)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  found = stage.score(config, colours, opened, name='colours', mesh=mesh)
  assert 0 < found['coco/multi_label/mAP'] <= 1
  assert found['coco/multi_label/mAP_count'] == 3
  assert not any('knn' in name for name in found)
