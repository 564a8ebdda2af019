"""Columns of every type: read, or refused with the name of the field."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlcd_jax.data import parquet
from mlcd_jax.runtime import errors
from tests.data import shards

_IMAGES = [shards.jpeg(i) for i in range(3)]


def _opened(path, **columns):
  """The source of one file with these columns, three rows."""
  columns = {'image': _IMAGES} | columns
  pq.write_table(pa.table(columns), path / '0.parquet')
  return shards.opened('parquet', path / '0.parquet')


@pytest.mark.parametrize(
  'column',
  [
    pa.array(_IMAGES, pa.binary()),
    pa.array(_IMAGES, pa.large_binary()),
    pa.array(_IMAGES, pa.binary_view()),
    pa.array(_IMAGES).dictionary_encode(),
    pa.array([{'bytes': x, 'path': 'a'} for x in _IMAGES]),
    pa.array(
      [{'bytes': x} for x in _IMAGES], pa.struct([('bytes', pa.large_binary())])
    ),
  ],
  ids=lambda column: str(column.type),
)
def test_images_of_any_type_of_bytes(tmp_path, column):
  source, found = _opened(tmp_path, image=column)
  assert [source[i]['image'] for i in range(3)] == _IMAGES
  assert not found.counts


@pytest.mark.parametrize(
  'column',
  [
    pa.array([[{'bytes': x, 'path': None}] for x in _IMAGES]),
    pa.array([[x] for x in _IMAGES]),
    pa.array([list(x[:9]) for x in _IMAGES]),
    pa.array([{'data': x} for x in _IMAGES]),
    pa.array(['a.jpg', 'b.jpg', 'c.jpg']),
    pa.array([1, 2, 3]),
  ],
  ids=lambda column: str(column.type)[:20],
)
def test_what_is_no_image_is_refused(tmp_path, column):
  with pytest.raises(errors.UserError) as e:
    _opened(tmp_path, image=column)
  message = str(e.value)
  assert message.startswith(f'data.image_key=image: {tmp_path}/0.parquet has ')
  assert str(column.type).replace('item', 'element') in message


@pytest.mark.parametrize(
  ('column', 'keys'),
  [
    (pa.array([7, 8, 9]), [b'7', b'8', b'9']),
    (pa.array([7, 8, 9], pa.uint8()), [b'7', b'8', b'9']),
    (pa.array([b'a', b'b', b'c']), [b'a', b'b', b'c']),
    (pa.array(['a', 'b', 'c'], pa.large_string()), [b'a', b'b', b'c']),
    (pa.array(['a', 'b', 'c'], pa.string_view()), [b'a', b'b', b'c']),
    (pa.array(['a', 'b', 'c']).dictionary_encode(), [b'a', b'b', b'c']),
    (pa.array(['a', None, 'c']), [b'a', b'0-000000001', b'c']),
    (
      pa.array([decimal.Decimal(x) for x in ('1.5', '2.5', '3.5')]),
      [b'1.5', b'2.5', b'3.5'],
    ),
    (
      pa.array([datetime.date(2024, 5, day) for day in (1, 2, 3)]),
      [b'2024-05-01', b'2024-05-02', b'2024-05-03'],
    ),
    (
      pa.array([['a'], ['b'], ['c']]),
      [b'0-000000000', b'0-000000001', b'0-000000002'],
    ),
  ],
  ids=lambda value: str(getattr(value, 'type', ''))[:20],
)
def test_keys_of_any_type(tmp_path, column, keys):
  source, found = _opened(tmp_path, key=column)
  assert source.keys().tolist() == keys
  assert not found.counts


@pytest.mark.parametrize(
  ('column', 'rows', 'left_out'),
  [
    (pa.array([200, 200, 404]), 3, {}),
    (pa.array(['approved', 'new', None]), 3, {}),
    (pa.array([['success']] * 3), 3, {}),
    (
      pa.array(['success', 'failed_to_download', 'failed_to_resize']),
      1,
      {'failed download': 2},
    ),
    (
      pa.array(
        ['success', 'failed_to_download', 'success'], pa.large_string()
      ).dictionary_encode(),
      2,
      {'failed download': 1},
    ),
  ],
)
def test_only_img2dataset_says_which_downloads_failed(
  tmp_path, column, rows, left_out
):
  source, found = _opened(tmp_path, status=column)
  assert len(source) == rows
  assert found.left_out == left_out
  assert not found.counts


@pytest.mark.parametrize(
  ('column', 'labels'),
  [
    (pa.array([2, 0, None], pa.uint8()), [2, 0, -1]),
    (pa.array([2, 0, 1], pa.uint64()), [2, 0, 1]),
    (pa.array([True, False, True]), [1, 0, 1]),
    (pa.array([2.0, None, float('nan')]), [2, -1, -1]),
    (pa.array(np.array([2, 0, 1], np.float16)), [2, 0, 1]),
    (pa.array([10**15, 5, 5]).dictionary_encode(), [10**15, 5, 5]),
    (pa.array([decimal.Decimal(3), decimal.Decimal(0), None]), [3, 0, -1]),
    (pa.nulls(3), [-1, -1, -1]),
  ],
  ids=lambda value: str(getattr(value, 'type', '')),
)
def test_labels_of_any_type_of_number(tmp_path, column, labels):
  source, _ = _opened(tmp_path, label=column)
  assert [source[i]['label'] for i in range(3)] == labels
  assert source.labels().tolist() == labels
  assert source.num_classes == max(labels) + 1
  assert source.label_problem == ''


@pytest.mark.parametrize(
  ('column', 'problem'),
  [
    (pa.array(['cat', 'dog', 'cat']), 'text'),
    (pa.array(['cat', 'dog', 'cat']).dictionary_encode(), 'text'),
    (pa.array([[1], [2], [1, 2]]), 'of type list'),
    (pa.array([{'id': 1}] * 3), 'of type struct'),
    (pa.array([datetime.date(2024, 5, 1)] * 3), 'of type date32'),
    (pa.array([0.5, 1.0, 2.0]), 'other than whole numbers'),
    (pa.array([2**64 - 1, 0, 1], pa.uint64()), 'other than whole numbers'),
  ],
)
def test_other_labels_are_none(tmp_path, column, problem):
  """Embedding and training need none; evaluation says what they are."""
  source, found = _opened(tmp_path, label=column)
  assert [source[i]['label'] for i in range(3)] == [-1, -1, -1]
  assert source.num_classes == 0
  assert problem in source.label_problem
  assert not found.counts


@pytest.mark.parametrize(
  'kind',
  [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.dictionary(pa.int32(), pa.string()),
  ],
)
def test_captions_of_any_type_of_text(tmp_path, kind):
  """Polars writes large or view types."""
  texts = pa.array(['one', None, 'caf\u00e9']).cast(pa.large_string())
  if pa.types.is_dictionary(kind):
    texts = texts.cast(pa.string()).dictionary_encode()
  else:
    texts = texts.cast(kind)
  source, _ = _opened(tmp_path, caption=texts)
  captions = [source[i]['caption'] for i in range(3)]
  assert captions == ['one', '', 'caf\u00e9']


@pytest.mark.parametrize(
  'item', [pa.string(), pa.large_string(), pa.string_view()]
)
@pytest.mark.parametrize('several', [pa.list_, pa.large_list])
def test_several_captions_are_lines(tmp_path, several, item):
  rows = [['one', None, 'two'], [], None]
  source, _ = _opened(tmp_path, caption=pa.array(rows, several(item)))
  assert [source[i]['caption'] for i in range(3)] == ['one\ntwo', '', '']


@pytest.mark.parametrize(
  'column', [[{'text': 'a'}] * 3, [[{'text': 'a'}]] * 3, [1, 2, 3]]
)
def test_other_captions_are_none_and_said(tmp_path, column, monkeypatch):
  lines = []
  monkeypatch.setattr(
    parquet._log, 'warning', lambda text, *args: lines.append(text % args)
  )
  source, _ = _opened(tmp_path, caption=column)
  assert [source[i]['caption'] for i in range(3)] == ['', '', '']
  (line,) = lines
  assert line.startswith('data.caption_key=caption: ')
  assert 'is no text' in line
