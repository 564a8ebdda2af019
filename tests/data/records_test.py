"""Records of more ArrayRecord files than may be open."""

import os
import pickle
import resource

from array_record.python import array_record_module
import pytest

from mlcd_jax.data import records
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import storage


def write(path, texts):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for text in texts:
    writer.write(text.encode())
  writer.close()
  return str(path)


def test_more_files_than_may_be_open(tmp_path):
  paths = [
    write(tmp_path / f'{i}.array_record', [f'{i}-{j}' for j in range(3)])
    for i in range(80)
  ]
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = max(int(name) for name in os.listdir('/proc/self/fd')) + 60
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
  try:
    found = records.whole(paths)
    assert len(found) == 240
    expected = [f'{i}-{j}'.encode() for i in range(80) for j in range(3)]
    assert [found[i] for i in range(240)] == expected
    found = pickle.loads(pickle.dumps(found))
    assert [found[i] for i in range(239, -1, -1)] == expected[::-1]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_parts(tmp_path):
  paths = [write(tmp_path / name, f'{name}1 {name}2 {name}3'.split())
           for name in 'ab']  # fmt: skip
  a, b = map(records.found, paths)
  parts = [records.Part(a, 1, 2), records.Part(b, 0, 0), records.Part(b, 2, 1)]
  found = records.Records(parts)
  assert [found[i] for i in range(len(found))] == [b'a2', b'a3', b'b3']


def test_a_file_made_anew_is_read_anew(tmp_path):
  path = write(tmp_path / 'a', ['old'])
  old = records.whole([path])
  assert old[0] == b'old'
  write(tmp_path / 'b', ['new'])
  os.utime(tmp_path / 'b', ns=(1, 1))
  os.replace(tmp_path / 'b', path)
  new = records.whole([path])
  assert new[0] == b'new'
  assert old[0] == b'old'  # It is open still.
  file = storage.File(path, 1, 'another time')
  with pytest.raises(errors.RunError, match='a: changed since this run opened'):
    records.Records([records.Part(file, 0, 1)])[0]
  os.unlink(path)
  with pytest.raises(errors.RunError, match='a: cannot be read'):
    records.Records([records.Part(file, 0, 1)])[0]
