"""The embed stage: turns images into unit rows with an embedder.

A shard is a fixed range of records, so its bytes do not depend on the number of
hosts. A finished shard is skipped after a restart. With embed.views a shard has
a second file with the rows of the images' views.

Shapes: V views of an image, S pixels of a side, D dimensions.
"""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from mlcd_jax import manifests
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.data import views as views_lib
from mlcd_jax.embed import embedders
from mlcd_jax.embed import precomputed
from mlcd_jax.embed import shards
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import problems
from mlcd_jax.runtime import progress as progress_lib

# Batches that are decoded ahead, and batches that the devices have queued. Two
# keep both busy without holding many images in memory.
_AHEAD = 2

_log = logging.getLogger(__name__)


def run(
  config: ml_collections.ConfigDict, manifest: manifests.Manifest
) -> None:
  """Embeds `data.split` into the manifest's folder.

  With embed.embedder=precomputed it only records where the embeddings are.

  Args:
    config: the config of the run.
    manifest: the manifest of this stage.

  Raises:
    UserError: the data cannot be read, or too many images are bad.
  """
  if config.embed.embedder == 'precomputed':
    manifest.finish(**precomputed.describe(config.embed))
    return
  source = sources.make(config.data)
  sources.check_same(source, 'data.path')
  folder, grids = manifest.folder, tuple(config.embed.views)
  if distributed.is_main():  # The others wait for it in the next call.
    files.remove_leftovers(shards.views_folder(folder))
  manifests.check_bad_keys(config.data.bad_keys, manifest)
  if not {'mean', 'path'} & set(manifest.notes):
    manifest.notes |= embedders.pin(
      config.embed, lambda hog: _mean_row(hog, source, grids)
    )
    manifest.save()
  embedder = embedders.load_embedder(
    manifest, batch_size=config.embed.batch_size
  )
  starts = range(0, len(source), config.embed.shard_rows)
  progress = progress_lib.Progress('embed', len(source), unit='images')
  for shard, start in enumerate(starts):
    stop = min(start + config.embed.shard_rows, len(source))
    own = shard % jax.process_count() == jax.process_index()
    if own and not _is_made(folder, shard, grids):
      _embed_shard(
        embedder,
        source,
        range(start, stop),
        folder,
        shard,
        grids=grids,
        progress=progress,
      )
    progress.update(stop)
  distributed.barrier('embed')
  manifest.finish(**_summary(folder, len(starts), len(source), config))


def _is_made(folder: pathlib.Path, shard: int, grids: Sequence[int]) -> bool:
  """Returns whether a shard and, with grids, that of its views are complete."""
  folders = [folder, *[shards.views_folder(folder)] * bool(grids)]
  return all(shards.row_path(f, shard).exists() for f in folders)


def _embed_shard(
  embedder: embedders.Embedder,
  source: sources.Source,
  records: range,
  folder: pathlib.Path,
  shard: int,
  *,
  grids: Sequence[int],
  progress: progress_lib.Progress,
) -> None:
  """Embeds a range of records into one shard; bad images get no row."""
  rows, keys, captions = [], [], []
  bad = problems.Problems('embed')
  submitted = collections.deque()

  def collect():
    count, out, done = submitted.popleft()
    # The type of the files, which halves the memory.
    rows.append(np.asarray(out)[:count].astype(np.float16))
    if done < records.stop:  # `run` reports the shard once it is written.
      progress.update(done)

  for stop, decoded in _decoded(embedder, source, records, grids):
    images = []
    for record, image in decoded:
      if isinstance(image, transforms.BadImage):
        bad.add(record['key'], str(image))
        continue
      images.extend(image)
      keys.append(record['key'])
      captions.append(record['caption'])
    # Only the views of a single image can be more than one call takes.
    for start in range(0, len(images), embedder.batch_rows):
      part = images[start : start + embedder.batch_rows]
      submitted.append((len(part), embedder.submit(np.stack(part)), stop))
    while len(submitted) > _AHEAD:
      collect()
  while submitted:
    collect()
  if not rows:
    # All images are bad. A black image tells the width of the empty shard.
    size = embedder.image_size
    rows = [embedder(np.zeros((1, size, size, 3), np.uint8))[:0]]
  shape = len(keys), 1 + views_lib.count(grids), rows[0].shape[1]
  rows = np.concatenate(rows).reshape(shape)
  if grids:
    shards.write_views(
      shards.views_folder(folder), shard, rows=rows[:, 1:], keys=keys
    )
  shards.write_shard(
    folder,
    shard,
    rows=rows[:, 0],
    keys=keys,
    captions=captions,
    notes={'bad': dict(bad.counts), 'examples': bad.examples},
  )


def _decoded(
  embedder: embedders.Embedder,
  source: sources.Source,
  records: range,
  grids: Sequence[int],
) -> Iterator[tuple[int, list[tuple[dict[str, Any], Any]]]]:
  """Decodes batches of records ahead in threads.

  Yields:
    The number of the record after the batch, and the batch: a list of (record,
    images uint8 [1 + V, S, S, 3] or BadImage) in order.
  """

  def decode(index):
    record = source[index]
    try:
      image = _images(embedder, record, grids)
    except transforms.BadImage as e:
      image = e
    # The encoded image is dropped; it is no longer needed and may be large.
    return {k: record[k] for k in ('key', 'caption')}, image

  pool = futures.ThreadPoolExecutor(
    pipelines.num_threads(embedder.image_size), 'embed'
  )
  waiting = collections.deque()
  # As many records as fill a call of the embedder with their views.
  step = max(1, embedder.batch_rows // (1 + views_lib.count(grids)))
  try:
    for start in range(records.start, records.stop, step):
      stop = min(start + step, records.stop)
      batch = [pool.submit(decode, i) for i in range(start, stop)]
      waiting.append((stop, batch))
      if len(waiting) > _AHEAD:
        stop, batch = waiting.popleft()
        yield stop, [f.result() for f in batch]
    for stop, batch in waiting:
      yield stop, [f.result() for f in batch]
  finally:
    pool.shutdown(cancel_futures=True)


def _images(
  embedder: embedders.Embedder, record: dict[str, Any], grids: Sequence[int]
) -> np.ndarray:
  """Returns a record's image and its views, uint8 [1 + V, S, S, 3]."""
  pixels = transforms.decode(record['image'])
  return views_lib.prepare(pixels, grids, embedder.prepare)


def _mean_row(
  embedder: embedders.Hog, source: sources.Source, grids: Sequence[int]
) -> np.ndarray:
  """Returns the mean of the features of all images and views, float32 [D].

  Every host reads all images, so that the order of the sum is fixed.
  """
  total, count = 0.0, 0
  progress = progress_lib.Progress('embed (mean)', len(source), unit='images')
  for i in range(len(source)):
    try:
      images = _images(embedder, source[i], grids)
    except transforms.BadImage:
      continue
    for feature in embedder.features(images):
      total = total + feature.astype(np.float64)
    count += len(images)
    progress.update(i + 1)
  if not count:
    raise errors.UserError('data.path: not one image could be decoded')
  return (total / count).astype(np.float32)


def _summary(
  folder: pathlib.Path,
  num_shards: int,
  num_records: int,
  config: ml_collections.ConfigDict,
) -> dict[str, Any]:
  """Returns the result of the finished stage for its manifest.

  Raises:
    UserError: too many images are bad.
  """
  bad = problems.Problems('embed')
  for shard in range(num_shards):
    notes = shards.read_notes(folder, shard)
    bad.merge(notes['bad'], notes['examples'])
  bad.check(num_records, config.data.max_bad_fraction)
  rows = shards.Embeddings(folder, num_shards)
  views = {}
  if config.embed.views:
    sha256 = shards.read_sha256(shards.views_folder(folder), num_shards)
    per_image = views_lib.count(config.embed.views)
    views = {'views': {'rows_per_image': per_image, 'sha256': sha256}}
  return {
    'num_records': num_records,
    'shard_rows': rows.shard_rows,
    'dim': rows.shape[1],
    'bad': dict(bad.counts),
    'sha256': shards.read_sha256(folder, num_shards),
    **views,
  }
