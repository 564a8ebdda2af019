"""Every kind of tar and member: what is taken, what is left out and why."""

import io
import shutil
import subprocess
import tarfile

import pytest

from mlcd_jax.data import sources
from mlcd_jax.runtime import errors
from tests.data import shards

_GNU_TAR = shutil.which('tar') and b'GNU' in (
  subprocess.run(['tar', '--version'], capture_output=True).stdout
)


def _members(count, first=0):
  return [(f'{i:04d}.jpg', shards.jpeg(i)) for i in range(first, first + count)]


def _images(source):
  """Key -> image."""
  return {
    record['key']: record['image'] for record in map(_at(source), source.keys())
  }


def _at(source):
  keys = source.keys().tolist()
  return lambda key: source[keys.index(key)]


def _tarfile_images(path):
  """Key -> image, as Python reads them."""
  with tarfile.open(path) as f:
    return {
      m.name.removeprefix('./').removesuffix('.jpg'): f.extractfile(m).read()
      for m in f
      if m.isreg() and m.name.endswith('.jpg')
    }


def _add(f, name, content=b'', kind=tarfile.REGTYPE, **fields):
  """Writes a member of any type, with data."""
  info = tarfile.TarInfo(name)
  info.size, info.type = len(content), kind
  for field, value in fields.items():
    setattr(info, field, value)
  f.addfile(info, io.BytesIO(content))


def _hole(path, begin):
  with open(path, 'wb') as f:
    f.write(begin)
    f.seek(1 << 20)
    f.write(b'tail')


@pytest.mark.skipif(not _GNU_TAR, reason='needs GNU tar')
@pytest.mark.parametrize(
  ('options', 'sparse'),
  [
    (['--format=gnu', '--sparse'], True),
    (['--format=posix', '--sparse', '--sparse-version=0.0'], True),
    (['--format=posix', '--sparse', '--sparse-version=0.1'], True),
    (['--format=posix', '--sparse', '--sparse-version=1.0'], True),
    (['--format=gnu', '--listed-incremental=snapshot'], False),
    (['--format=gnu', '--label=0000.jpg'], False),
  ],
)
def test_members_of_gnu_tar(tmp_path, options, sparse):
  folder = tmp_path / 'a'
  folder.mkdir()
  for name, content in _members(6):
    (folder / name).write_bytes(content)
  _hole(folder / '0002.raw', b'head')
  _hole(folder / '0003a.jpg', shards.jpeg(9))
  command = ['tar', '--sort=name', *options, '-cf', 'a.tar', 'a']
  subprocess.run(command, cwd=tmp_path, check=True)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  expected = _tarfile_images(tmp_path / 'a.tar')
  assert len(expected) == 7
  if sparse:
    del expected['a/0003a']
    assert found.counts == {'sparse file': 1}
    assert found.examples == ['a/0003a.jpg (sparse file)']
  else:
    assert not found.counts
  assert _images(source) == expected
  assert found.left_out == {'other file': 1}


def test_sparse_file_without_a_hole_is_an_image(tmp_path):
  """As GNU tar writes what a file system has compressed."""
  image = shards.jpeg(3)
  with tarfile.open(tmp_path / 'a.tar', 'w', format=tarfile.PAX_FORMAT) as f:
    fields = {
      'GNU.sparse.major': '0',
      'GNU.sparse.minor': '1',
      'GNU.sparse.name': 'x/0001.jpg',
      'GNU.sparse.size': str(len(image)),
      'GNU.sparse.numblocks': '1',
      'GNU.sparse.map': f'0,{len(image)}',
    }
    _add(f, 'GNUSparseFile.0/0001.jpg', image, pax_headers=fields)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert _images(source) == {'x/0001': image}
  assert not found.counts


@pytest.mark.parametrize('kind', [b'D', b'V', b'M', b'N', b'7', b'Z', b'X'])
def test_data_of_other_types_are_skipped(tmp_path, kind):
  """Folder dumps, volumes, contiguous, unknown and Solaris's headers."""
  with tarfile.open(tmp_path / 'a.tar', 'w', format=tarfile.GNU_FORMAT) as f:
    _add(f, '0000.jpg', shards.jpeg(0))
    content = b'22 comment=a picture\n' if kind == b'X' else b'x' * 1_300
    _add(f, 'other', content, kind)
    _add(f, '0001.jpg', shards.jpeg(1), b'7' if kind == b'7' else b'0')
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert _images(source) == _tarfile_images(tmp_path / 'a.tar')
  assert len(source) == 2
  assert not found.counts


@pytest.mark.parametrize(
  ('kind', 'reason'),
  [
    (b'M', 'no regular file'),
    (tarfile.FIFOTYPE, 'no regular file'),
    (tarfile.CHRTYPE, 'no regular file'),
  ],
)
def test_an_image_that_is_no_file_is_counted(tmp_path, kind, reason):
  with tarfile.open(tmp_path / 'a.tar', 'w', format=tarfile.GNU_FORMAT) as f:
    _add(f, '0000.jpg', b'x' * 100 if kind == b'M' else b'', kind)
    _add(f, '0000.txt', b'caption')
    _add(f, '0001.jpg', shards.jpeg(1))
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert source.keys().tolist() == [b'0001']
  assert found.counts == {reason: 1}


def test_links_are_the_files_they_lead_to(tmp_path):
  with tarfile.open(tmp_path / 'a.tar', 'w') as f:
    _add(f, './a/0000.jpg', shards.jpeg(0))
    _add(f, './a/0000.txt', b'the caption of all')
    _add(f, './a/0000.cls', b'2')
    _add(f, './a/0001.jpg', kind=tarfile.LNKTYPE, linkname='./a/0000.jpg')
    _add(f, './a/0001.txt', kind=tarfile.LNKTYPE, linkname='a/0000.txt')
    _add(f, './a/0001.cls', kind=tarfile.LNKTYPE, linkname='./a/0000.cls')
    _add(f, './a/big.bin', b'x' * (3 << 20))
    _add(f, './b/0002.jpg', kind=tarfile.SYMTYPE, linkname='../a/0000.jpg')
    _add(f, './b/0003.jpg', shards.jpeg(3))
    _add(f, './b/0003.txt', kind=tarfile.SYMTYPE, linkname='../a/0001.txt')
    _add(f, './b/0004.jpg', kind=tarfile.SYMTYPE, linkname='/etc/passwd')
    _add(f, './b/0005.jpg', kind=tarfile.LNKTYPE, linkname='b/0009.jpg')
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  same = dict(image=shards.jpeg(0), label=2, caption='the caption of all')
  assert source[0] == {'key': 'a/0000', **same}
  assert source[1] == {'key': 'a/0001', **same}
  assert source[2]['image'] == shards.jpeg(0)
  assert source[3]['image'] == shards.jpeg(3)
  assert source[3]['caption'] == 'the caption of all'
  assert len(source) == 4
  assert found.counts == {'link to no earlier file': 2}
  assert found.left_out == {'other file': 1}


def test_what_is_no_image_is_counted_but_not_bad(tmp_path):
  members = [
    *_members(2),
    ('0000.json', b'{}'),
    ('._0000.jpg', b'resource fork'),
    ('a/.hidden.jpg', shards.jpeg(7)),
    ('photo.2019.05.jpg', shards.jpeg(8)),
    ('README', b'x'),
  ]
  shards.tar(tmp_path / 'a.tar', members)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert len(source) == 2
  assert not found.counts
  assert found.left_out == {
    'other file': 2,
    'hidden file': 2,
    'name with several dots': 1,
  }
  assert found.summary() == (
    '0 bad, 5 left out (2 other file, 2 hidden file, 1 name with several dots)'
  )
  shards.tar(tmp_path / 'b.tar', members[2:])
  with pytest.raises(errors.UserError, match='no images; 0 bad, 5 left out'):
    sources.make(shards.data('webdataset', tmp_path / 'b.tar'))


@pytest.mark.parametrize(
  'write',
  [
    lambda f: _add(f, 'x' * 200 + '.jpg', shards.jpeg(0)),
    lambda f: _add(f, 'a.jpg', shards.jpeg(0), pax_headers={'path': 'b.jpg'}),
    lambda f: _add(f, 'a.jpg', shards.jpeg(0), pax_headers={'comment': 'ä'}),
    lambda f: _add(f, 'a.jpg', shards.jpeg(0), uid=2**40, mtime=1.5),
  ],
)
@pytest.mark.parametrize('format', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extended_headers(tmp_path, write, format):
  path = tmp_path / 'a.tar'
  with tarfile.open(
    path, 'w', format=format, pax_headers={'comment': 'of all'}
  ) as f:
    write(f)
    _add(f, '0001.jpg', shards.jpeg(1))
  source, found = shards.opened('webdataset', path)
  assert _images(source) == _tarfile_images(path)
  assert len(source) == 2
  assert not found.counts


def test_sizes_of_pax_and_in_base_256(tmp_path):
  """As they are written for files of 8 GiB and more."""
  image = shards.jpeg(0)
  record = f'size={len(image)}\n'.encode()
  record = b'%d ' % (len(record) + 3) + record
  with tarfile.open(tmp_path / 'a.tar', 'w', format=tarfile.GNU_FORMAT) as f:
    _add(f, 'x', record, tarfile.XHDTYPE)
    _add(f, '0000.jpg', image)
    _add(f, '0001.jpg', shards.jpeg(1))
  content = bytearray((tmp_path / 'a.tar').read_bytes())
  for name, size in ((b'0000.jpg', b'0' * 11 + b'\0'), (b'0001.jpg', None)):
    place = content.index(name)
    if size is None:
      number = int(content[place + 124 : place + 135], 8)
      size = b'\x80' + number.to_bytes(11, 'big')
    content[place + 124 : place + 136] = size
    content[place + 148 : place + 156] = b' ' * 8
    total = sum(content[place : place + 512])
    content[place + 148 : place + 156] = b'%06o\0 ' % total
  (tmp_path / 'a.tar').write_bytes(content)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert _images(source) == {'0000': image, '0001': shards.jpeg(1)}
  assert _images(source) == _tarfile_images(tmp_path / 'a.tar')
  assert not found.counts


def test_tars_joined_by_cat_are_read_whole(tmp_path):
  parts = []
  for i in range(3):
    shards.tar(tmp_path / 'part', _members(2, first=2 * i))
    parts.append((tmp_path / 'part').read_bytes())
  (tmp_path / 'a.tar').write_bytes(b''.join(parts) + b'trailing' * 100)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert _images(source) == {f'{i:04d}': shards.jpeg(i) for i in range(6)}
  assert not found.counts
  (tmp_path / 'b.tar').write_bytes(b''.join(parts)[: -len(parts[2]) + 700])
  source, found = shards.opened('webdataset', tmp_path / 'b.tar')
  assert len(source) == 4
  assert found.counts == {'truncated tar': 1}


@pytest.mark.parametrize(
  ('name', 'kind'), [('gz', 'gzip'), ('bz2', 'bzip2'), ('xz', 'xz')]
)
def test_a_compressed_tar_is_named(tmp_path, name, kind):
  path = tmp_path / 'a.tar'
  with tarfile.open(path, f'w:{name}') as f:
    _add(f, '0000.jpg', shards.jpeg(0))
  with pytest.raises(errors.UserError) as e:
    shards.opened('webdataset', path)
  assert str(e.value).startswith(f'data.path={path}: is compressed ({kind})')


@pytest.mark.parametrize(
  'damage',
  [
    lambda header: header[:124] + b'-7777777777\0' + header[136:],
    lambda header: header[:124] + b'77777777777\0' + header[136:],
    lambda header: b'\xff' * 512,
  ],
)
def test_a_damaged_header_ends_a_tar(tmp_path, damage):
  """Its checksum may be right; nothing loops, and the rest is counted."""
  shards.tar(tmp_path / 'a.tar', _members(4))
  content = bytearray((tmp_path / 'a.tar').read_bytes())
  place = content.index(b'0002.jpg')
  header = bytearray(damage(bytes(content[place : place + 512])))
  header[148:156] = b' ' * 8
  header[148:156] = b'%06o\0 ' % sum(header)
  content[place : place + 512] = header
  (tmp_path / 'a.tar').write_bytes(content)
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert source.keys().tolist() == [b'0000', b'0001']
  assert found.counts == {'truncated tar': 1}


def test_labels_of_many_digits_and_of_none(tmp_path):
  ids = [b'7308324466020115', b' 12\n', b'-1', b'', b'cat', b'9' * 30, b'3.0']
  shards.tar(
    tmp_path / 'a.tar',
    [
      member
      for i, text in enumerate(ids)
      for member in ((f'{i}.jpg', shards.jpeg(i)), (f'{i}.cls', text))
    ],
  )
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  labels = [source[i]['label'] for i in range(len(ids))]
  assert labels == [7308324466020115, 12, -1, -1, -1, -1, -1]
  assert found.left_out == {'label that is no number': 3}


def test_names_that_are_no_utf8_stay_different(tmp_path):
  with tarfile.open(
    tmp_path / 'a.tar', 'w', format=tarfile.GNU_FORMAT, encoding='latin-1'
  ) as f:
    for i, name in enumerate(['caf\u00e9', 'caf\u00e8']):
      _add(f, f'{name}.jpg', shards.jpeg(i))
  source, found = shards.opened('webdataset', tmp_path / 'a.tar')
  assert len(source) == 2
  assert [source[i]['image'] for i in (0, 1)] == [
    shards.jpeg(0),
    shards.jpeg(1),
  ]
  assert not found.counts
