"""Files that many threads read are the right ones, and few are open."""

import os
import pathlib
import resource
import subprocess
import sys
import threading

import pytest

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import open_files
from mlcd_jax.runtime import storage

# folder, files, limit, threads, reads -> reads that failed, and wrong ones.
_READS = """
from concurrent import futures
import random, resource, struct, sys
from mlcd_jax.runtime import storage

folder = sys.argv[1]
count, limit, threads, reads = map(int, sys.argv[2:])
blocks = 64
files = []
for i in range(count):
  with open(f'{folder}/{i}', 'wb') as f:
    f.write(b''.join(struct.pack('<II', i, b) for b in range(blocks)))
  files.append(storage.stat(f.name))
if limit:
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

def work(seed):
  rng = random.Random(seed)
  failed = wrong = 0
  for _ in range(reads // threads):
    # Half of the reads are of few files, which several threads open at once.
    i = int(rng.random() * (count if rng.random() < 0.5 else 9))
    b = int(rng.random() * blocks)
    try:
      wrong += storage.read(files[i], 8 * b, 8) != struct.pack('<II', i, b)
    except Exception as e:
      failed += 1
      print(repr(e), file=sys.stderr)
  return failed, wrong

with futures.ThreadPoolExecutor(threads) as pool:
  done = list(pool.map(work, range(threads)))
print(*map(sum, zip(*done)))
"""


@pytest.mark.parametrize(
  ('files', 'limit', 'reads'),
  [
    (40, 96, 200_000),
    pytest.param(2_000, 0, 1_000_000, marks=pytest.mark.slow),
    pytest.param(300, 96, 1_000_000, marks=pytest.mark.slow),
  ],
)
def test_many_threads_read_more_files_than_may_be_open(
  tmp_path, files, limit, reads
):
  done = subprocess.run(
    [sys.executable, '-c', _READS, str(tmp_path)]
    + [str(n) for n in (files, limit, 16, reads)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent.parent,
  )
  assert done.stdout == '0 0\n', done.stderr[-2_000:]


def test_what_others_dropped_is_held_until_it_is_read(tmp_path):
  """As the cache drops a file while another thread is about to read it."""
  (tmp_path / 'a').write_bytes(b'a')
  opened = open_files.kept(lambda path: open(path, 'rb', buffering=0))
  barrier = threading.Barrier(8)
  found = []

  def work():
    barrier.wait()
    file = opened(tmp_path / 'a')
    barrier.wait()  # All but one of them are in no cache.
    found.append(os.pread(file.fileno(), 1, 0))

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [b'a'] * 8


def test_few_are_open_where_few_are_allowed(tmp_path):
  def fds():
    return [int(name) for name in os.listdir('/proc/self/fd')]

  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = max(fds()) + 40
  paths = [tmp_path / str(i) for i in range(limit)]
  for path in paths:
    path.write_text('')
  opened = open_files.kept(lambda path: open(path, 'rb', buffering=0))
  other = open_files.kept(lambda path: open(path, 'rb', buffering=0))
  start = len(fds())
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
  try:
    for path in paths:
      opened(path)
    assert len(fds()) - start <= limit // 4
    # The limit is met with files of others; ours give way.
    held = []
    with pytest.raises(OSError, match='Too many open files'):
      while True:
        held.append(open(paths[0]))
    del held[-1:]
    with opened(paths[0]):
      pass
    del held
    other(paths[0])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _replaced(path):
  path.with_name('new').write_bytes(b'other bytes here')
  os.replace(path.with_name('new'), path)


def _overwritten(path):
  path.write_bytes(b'OTHER BYTES HERE')
  os.utime(path, ns=(1, 1))


@pytest.mark.parametrize('opened', [True, False])
@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (_replaced, 'changed since this run opened it'),
    (_overwritten, 'changed since this run opened it'),
    (lambda path: os.truncate(path, 6), 'shorter than it was'),
    (lambda path: os.truncate(path, 9), 'changed since this run opened it'),
    (os.unlink, 'cannot be read .*No such file'),
  ],
)
def test_a_changed_file_gives_no_other_bytes(tmp_path, change, says, opened):
  path = tmp_path / 'a'
  path.write_bytes(b'the right bytes!')
  file = storage.stat(str(path))
  if opened:
    assert storage.read(file, 4, 5) == b'right'
  change(path)
  try:
    found = storage.read(file, 4, 5)
  except errors.RunError as e:
    assert str(path) in str(e)
    with pytest.raises(errors.RunError, match=says):
      storage.read(file, 4, 5)
  else:  # The file that was opened is there as long as it is open.
    assert opened and change in (_replaced, os.unlink) and found == b'right'


def test_a_part_that_is_not_there(tmp_path):
  (tmp_path / 'a').write_bytes(b'0123456789')
  path = str(tmp_path / 'a')
  assert storage.read(path, 8, 9) == b'89'
  assert storage.read(path) == b'0123456789'
  with pytest.raises(errors.RunError, match='a: shorter than it was'):
    storage.read(storage.stat(path), 8, 9)
