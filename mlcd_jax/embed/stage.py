"""The embed stage: turns images into unit rows with an embedder.

A shard is a fixed range of records, so its bytes do not depend on the number of
hosts. A finished shard is skipped after a restart.
"""

import collections
from collections.abc import Iterator
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
  manifests.check_bad_keys(config.data.bad_keys, manifest)
  if not {'mean', 'path'} & set(manifest.notes):
    manifest.notes |= embedders.pin(
      config.embed, lambda hog: _mean_row(hog, source)
    )
    manifest.save()
  embedder = embedders.load_embedder(
    manifest, batch_size=config.embed.batch_size
  )
  folder = manifest.folder
  starts = range(0, len(source), config.embed.shard_rows)
  progress = progress_lib.Progress('embed', len(source), unit='images')
  for shard, start in enumerate(starts):
    stop = min(start + config.embed.shard_rows, len(source))
    if (
      shard % jax.process_count() == jax.process_index()
      and not shards.row_path(folder, shard).exists()
    ):
      _embed_shard(
        embedder, source, range(start, stop), folder, shard, progress
      )
    progress.update(stop)
  distributed.barrier('embed')
  manifest.finish(**_summary(folder, len(starts), len(source), config))


def _embed_shard(
  embedder: embedders.Embedder,
  source: sources.Source,
  records: range,
  folder: pathlib.Path,
  shard: int,
  progress: progress_lib.Progress,
) -> None:
  """Embeds a range of records into one shard; bad images get no row."""
  rows, keys, captions = [], [], []
  bad = problems.Problems('embed')
  submitted = collections.deque()

  def collect():
    count, out, done = submitted.popleft()
    rows.append(np.asarray(out)[:count])
    if done < records.stop:  # `run` reports the shard once it is written.
      progress.update(done)

  for stop, decoded in _decoded(embedder, source, records):
    images = []
    for record, image in decoded:
      if isinstance(image, transforms.BadImage):
        bad.add(record['key'], str(image))
        continue
      images.append(image)
      keys.append(record['key'])
      captions.append(record['caption'])
    if images:
      out = embedder.submit(np.stack(images))
      submitted.append((len(images), out, stop))
    if len(submitted) > _AHEAD:
      collect()
  while submitted:
    collect()
  if not rows:
    # All images are bad. A black image tells the width of the empty shard.
    size = embedder.image_size
    rows = [embedder(np.zeros((1, size, size, 3), np.uint8))[:0]]
  shards.write_shard(
    folder,
    shard,
    rows=np.concatenate(rows),
    keys=keys,
    captions=captions,
    notes={'bad': dict(bad.counts), 'examples': bad.examples},
  )


def _decoded(
  embedder: embedders.Embedder, source: sources.Source, records: range
) -> Iterator[tuple[int, list[tuple[dict[str, Any], Any]]]]:
  """Decodes batches of records ahead in threads.

  Yields:
    The number of the record after the batch, and the batch: a list of (record,
    image or BadImage) in order.
  """

  def decode(index):
    record = source[index]
    try:
      image = _image(embedder, record)
    except transforms.BadImage as e:
      image = e
    # The encoded image is dropped; it is no longer needed and may be large.
    return {k: record[k] for k in ('key', 'caption')}, image

  pool = futures.ThreadPoolExecutor(
    pipelines.num_threads(embedder.image_size), 'embed'
  )
  waiting = collections.deque()
  try:
    for start in range(records.start, records.stop, embedder.batch_rows):
      stop = min(start + embedder.batch_rows, records.stop)
      batch = [pool.submit(decode, i) for i in range(start, stop)]
      waiting.append((stop, batch))
      if len(waiting) > _AHEAD:
        stop, batch = waiting.popleft()
        yield stop, [f.result() for f in batch]
    for stop, batch in waiting:
      yield stop, [f.result() for f in batch]
  finally:
    pool.shutdown(cancel_futures=True)


def _image(embedder: embedders.Embedder, record: dict[str, Any]) -> np.ndarray:
  return embedder.prepare(transforms.decode(record['image']))


def _mean_row(embedder: embedders.Hog, source: sources.Source) -> np.ndarray:
  """Returns the mean of the features of all images, float32 [D].

  Every host reads all images, so that the order of the sum is fixed.
  """
  total, count = 0.0, 0
  progress = progress_lib.Progress('embed (mean)', len(source), unit='images')
  for i in range(len(source)):
    try:
      image = _image(embedder, source[i])
    except transforms.BadImage:
      continue
    total = total + embedder.features(image[None])[0].astype(np.float64)
    count += 1
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
  sha256 = {}
  for shard in range(num_shards):
    notes = shards.read_notes(folder, shard)
    bad.merge(notes['bad'], notes['examples'])
    metadata = shards.metadata_path(folder, shard)
    for path, digest in (
      (shards.row_path(folder, shard), notes['sha256']),
      (metadata, files.sha256(metadata)),
    ):
      sha256[str(path.relative_to(folder))] = digest
  bad.check(num_records, config.data.max_bad_fraction)
  rows = shards.Embeddings(folder, num_shards)
  return {
    'num_records': num_records,
    'shard_rows': rows.shard_rows,
    'dim': rows.shape[1],
    'bad': dict(bad.counts),
    'sha256': sha256,
  }
