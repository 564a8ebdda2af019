"""Records that are no examples, and features of other types."""

import pytest

from mlcd_jax.data import sources
from mlcd_jax.runtime import errors
from tests.data import shards


def _example(image=None, label=None, caption=b''):
  """A serialized tf.train.Example with these features."""
  example = shards.tf_example_generated_pb2.Example()
  for name, value in (('image', image), ('label', label), ('caption', caption)):
    for item in value if isinstance(value, list) else [value]:
      feature = example.features.feature[name]
      if isinstance(item, bytes):
        feature.bytes_list.value.append(item)
      elif isinstance(item, float):
        feature.float_list.value.append(item)
      elif item is not None:
        feature.int64_list.value.append(item)
  return example.SerializeToString()


def _write(path, records, options='group_size:1'):
  writer = shards.array_record_module.ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()


@pytest.mark.parametrize('garbage', [b'\xff' * 50, b'not a message', b''])
def test_a_record_that_is_no_example_has_no_image(tmp_path, garbage):
  records = [garbage, *(_example(shards.jpeg(i), i) for i in range(3))]
  _write(tmp_path / '0.array_record', records)
  source, _ = shards.opened('array_record', tmp_path)
  images = [source[i]['image'] for i in range(4)]
  assert images == [b'', *map(shards.jpeg, range(3))]
  assert source[0]['label'] == -1
  assert source.num_classes == 3


@pytest.mark.parametrize('garbage', [b'\xff' * 50, b'{"image": "a.jpg"}'])
def test_files_without_an_example_are_refused(tmp_path, garbage):
  _write(tmp_path / '0.array_record', [garbage] * 5)
  with pytest.raises(errors.UserError, match='no tf.train.Example messages'):
    shards.opened('array_record', tmp_path)


@pytest.mark.parametrize(
  ('image', 'kind'),
  [
    ([0.5, 1.0], '2 values of float_list'),
    ([1, 2, 3], '3 values of int64_list'),
    ([b'a', b'b'], '2 values of bytes_list'),
  ],
)
def test_an_image_of_another_type_is_refused(tmp_path, image, kind):
  _write(tmp_path / '0.array_record', [_example(image, 0)] * 3)
  with pytest.raises(errors.UserError) as e:
    shards.opened('array_record', tmp_path)
  assert str(e.value).startswith('data.image_key=image: ')
  assert kind in str(e.value)


@pytest.mark.parametrize(
  ('labels', 'problem'),
  [
    ([b'cat', b'dog'], 'text'),
    ([0.5, 1.5], 'a fraction'),
    ([[0], [0, 1]], 'a list'),
    ([[], [1]], ''),
  ],
)
def test_labels_that_are_no_class(tmp_path, labels, problem):
  records = [_example(shards.jpeg(i), x) for i, x in enumerate(labels)]
  _write(tmp_path / '0.array_record', records)
  source, _ = shards.opened('array_record', tmp_path)
  assert source.label_problem == problem
  assert source.num_classes == (0 if problem else 2)
  assert source[1]['image'] == shards.jpeg(1)
  opened = dict(train=source, test=source)
  options = dict(field='evaluate.datasets.x', label_key='label', keep=False)
  if problem:
    with pytest.raises(errors.UserError) as e:
      sources.number_classes(opened, **options)
    assert str(e.value).startswith(
      f'evaluate.datasets.x.label_key=label: is {problem} in the train split'
    )
  else:
    assert sources.number_classes(opened, **options) == opened


def test_groups_of_records_are_read_too(tmp_path):
  records = [_example(shards.jpeg(i), i) for i in range(30)]
  _write(tmp_path / '0.array_record', records, 'group_size:8')
  source, _ = shards.opened('array_record', tmp_path)
  assert [source[i]['image'] for i in (29, 0, 9)] == [
    shards.jpeg(i) for i in (29, 0, 9)
  ]
