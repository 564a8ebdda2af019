"""WebDataset tars, such as those of img2dataset, with random access.

An index of each tar has the positions of its images; see `tar_index`.
"""

from concurrent import futures
import functools
import logging
import multiprocessing
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from mlcd_jax.data import keys as keys_lib
from mlcd_jax.data import tar_index
from mlcd_jax.runtime import files
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import storage

_log = logging.getLogger(__name__)

# Image and caption are read at once if their positions differ by at most the
# image's size and this many bytes; otherwise with two reads.
_FAR = 2**20

# Starting a process takes seconds, as long as reading the headers of a tar of
# this size. With less data for each, more processes would not pay.
_BYTES_PER_PROCESS = 2 * 2**30


class TarSource:
  """A source of tars, which reads most records with one read; see `sources`.

  A key is the path of the image in the tar, without suffix. `keys.across`
  changes keys that several tars have.
  """

  class_names = ()

  def __init__(self, tars: list[storage.File], indices: list[tar_index.Index]):
    """Combines tars.

    Args:
      tars: the tars, as they were when they were found.
      indices: the index of each tar.
    """
    self._tars = tars
    self._ends = np.cumsum([len(index.keys) for index in indices])
    self._keys = files.SharedArray(
      keys_lib.across(
        [index.keys for index in indices], [tar.path for tar in tars]
      )
    )
    self._numbers = files.SharedArray(
      np.concatenate([index.numbers for index in indices], axis=1)
    )
    self.num_classes = int(self.labels().max(initial=-1)) + 1
    self.label_problem = ''
    if not self.num_classes and any(
      tar_index.NO_NUMBER in index.left_out for index in indices
    ):
      self.label_problem = 'no number'

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> dict[str, Any]:
    start, size, caption_start, caption_size, label = map(
      int, self._numbers[:, index]
    )
    shard = int(np.searchsorted(self._ends, index, side='right'))
    # The members of a sample mostly lie side by side, so one read gets both.
    first, last = start, start + size
    near = caption_start >= 0 and abs(caption_start - start) <= size + _FAR
    if near:
      first = min(first, caption_start)
      last = max(last, caption_start + caption_size)
    content = storage.read(self._tars[shard], first, last - first)
    caption = b''
    if near:
      place = caption_start - first
      caption = content[place : place + caption_size]
    # A caption far away is a link, such as one caption for many images.
    elif caption_start >= 0:
      caption = storage.read(self._tars[shard], caption_start, caption_size)
    return {
      'key': self._keys[index].decode(),
      'image': content[start - first : start - first + size],
      'label': label,
      'caption': caption.decode('utf-8', 'replace'),
    }

  def keys(self) -> np.ndarray:
    """Returns the spelled keys, bytes [N]; see `sources.Source`."""
    return self._keys.array

  def labels(self) -> np.ndarray:
    """Returns the class numbers int64 [N], which the index has."""
    return self._numbers.array[4]


def make(
  data: ml_collections.ConfigDict, split: str, found: problems.Problems
) -> TarSource:
  """Opens the tars of `data.path`; see `sources.make`.

  Args:
    data: the `data` fields of the config.
    split: the text that replaces '{split}' in `data.path`.
    found: counts the members and tars that cannot be used.

  Raises:
    UserError: there are no tars, or a tar is unreadable or compressed.
  """
  tars = storage.find(data.path.replace('{split}', split), ['.tar'])
  members = tar_index.Members(
    image=data.get('image_key', 'image'),
    label=data.label_key,
    caption=data.get('caption_key', 'caption'),
  )
  indices = _load_all(tars, members, data.get('cache_dir', ''))
  for index in indices:
    for reason, names in index.problems.items():
      for name in names:
        found.add(name, reason)
    for reason, count in index.left_out.items():
      found.leave_out(reason, count)
  return TarSource(tars, indices)


def _load_all(
  tars: list[storage.File], members: tar_index.Members, cache_dir: str
) -> list[tar_index.Index]:
  """Returns the index of each tar; builds the missing ones in parallel.

  Args:
    tars: the tars.
    members: the names of the members of a sample.
    cache_dir: the value of `data.cache_dir`.
  """
  options = dict(members=members, cache_dir=cache_dir)
  # Reading small files mostly waits, so many threads do it.
  with futures.ThreadPoolExecutor(32) as pool:
    indices = dict(
      zip(tars, pool.map(functools.partial(tar_index.find, **options), tars))
    )
  todo = [tar for tar in tars if indices[tar] is None]
  # Each host begins at another tar. On a shared disk they divide the work,
  # because `load` reads an index that another host has written meanwhile.
  first = jax.process_index() * len(todo) // jax.process_count()
  todo = [*todo[first:], *todo[:first]]
  if todo:
    _log.info('webdataset: indexing %d of %d tars', len(todo), len(tars))
    with _pool(todo) as pool:
      made = pool.map(functools.partial(tar_index.load, **options), todo)
      indices.update(zip(todo, made))
  return [indices[tar] for tar in tars]


def _pool(tars: list[storage.File]) -> futures.Executor:
  """Returns threads for remote tars and processes for local ones.

  Reading remote headers mostly waits for the network. Reading local headers is
  mostly Python code, which threads cannot run in parallel.
  """
  if any(storage.is_url(tar.path) for tar in tars):
    return futures.ThreadPoolExecutor(32)
  processes = min(
    os.cpu_count() or 1,
    len(tars),
    sum(tar.size for tar in tars) // _BYTES_PER_PROCESS,
  )
  if processes < 2:
    return futures.ThreadPoolExecutor(1)
  return futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context('spawn')
  )
