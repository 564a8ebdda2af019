"""The sections of the page, made from the files in a workdir.

Process 0 writes the page while the others continue, so these functions must not
wait for other processes. The exception is `patch_colours`, which all processes
call together.
"""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

import ml_collections
import numpy as np

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax.data import matching
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.embed import shards
from mlcd_jax.evaluate import encoders as evaluate_encoders
from mlcd_jax.evaluate import patches
from mlcd_jax.page import browser
from mlcd_jax.page import clusters
from mlcd_jax.page import thumbnails
from mlcd_jax.runtime import files

_MAX_SHOWN = 3  # Keys that are shown as examples.
_PATCH_PIXELS = 112  # The side of a picture, the same as in page.css.


def manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads a stage's manifest.json; returns {} if there is none."""
  path = folder / manifests.NAME
  return files.read_json(path) if path.exists() else {}


def browsers(
  config: ml_collections.ConfigDict,
  cache: pathlib.Path,
  *,
  embedded: pathlib.Path,
  clustered: pathlib.Path,
) -> dict[str, Any] | None:
  """Returns the data of the cluster and image browsers, cached in a file.

  The cache is replaced if a manifest or loss.num_positives has changed.

  Args:
    config: the config of the run.
    cache: the path of the cache.
    embedded: the folder of the embed stage.
    clustered: the folder of the cluster stage.

  Returns:
    The value of `browser.gather`; None if one of the stages is not finished.
  """
  made, done = manifest(embedded), manifest(clustered)
  if not done.get('complete') or not made.get('complete'):
    return None
  said = json.dumps([made, done, config.loss.num_positives], sort_keys=True)
  made_from = hashlib.sha256(said.encode()).hexdigest()
  if cache.exists():
    kept = files.read_json(cache)
    if kept.get('made_from') == made_from:
      return kept['browsers']
  shard_rows = made['result']['shard_rows']
  found = browser.gather(
    browser.Inputs(
      source=sources.make(config.data),
      embedded=shards.open_made(manifests.Manifest(folder=embedded, **made)),
      shards=clusters.Shards(clustered, shard_rows),
      centers=files.read_npy(clustered / 'centers.npy'),
      num_labels=config.loss.num_positives,
      seed=config.seed,
      root=matching.root_of(config.data.path),
      rule=done['config'].get('cluster.rule', 'nearest'),
    )
  )
  files.write_json(cache, {'made_from': made_from, 'browsers': found})
  return found


def patch_colours(
  encoder: evaluate_encoders.Encoder,
  source: sources.Source,
  *,
  count: int = 8,
) -> list[dict[str, Any]]:
  """Makes pictures of the patch features of some images.

  All processes must call it, since the parameters may be sharded over them.

  Args:
    encoder: the encoder of the run.
    source: the source of the images.
    count: the most images.

  Returns:
    For each image its `key`, and as data URLs its `image` and the `colours` of
    its patches.
  """
  keys, images = [], []
  # Twice as many are tried, since some may not decode.
  for i in np.linspace(0, len(source) - 1, 2 * count, dtype=int):
    record = source[int(i)]
    try:
      pixels = transforms.decode(record['image'])
    except transforms.BadImage:
      continue
    images.append(transforms.resize_center_crop(pixels, encoder.image_size))
    keys.append(record['key'])
  keys, images = keys[:count], images[:count]
  if not images:
    return []
  features = patches.patch_features(
    encoder.model, encoder.params, np.stack(images)
  )
  return [
    {
      'key': key,
      'image': thumbnails.encode(image, _PATCH_PIXELS),
      'colours': thumbnails.encode(colours, _PATCH_PIXELS),
    }
    for key, image, colours in zip(keys, images, patches.pca_colors(features))
  ]


def bad_data(
  workdir: pathlib.Path, *, embedded: pathlib.Path, clustered: pathlib.Path
) -> list[list[Any]]:
  """Returns the table of bad data, in rows [where, what, count, examples].

  Args:
    workdir: the folder of the run.
    embedded: the folder of the embed stage.
    clustered: the folder of the cluster stage.
  """
  rows = []
  made = manifest(embedded).get('result', {})
  examples = []
  for shard in range(len(made.get('shard_rows', ())) if made.get('bad') else 0):
    notes = shards.read_notes(embedded, shard)
    examples += notes['examples']
    # A run may have thousands of shards; the first few examples are enough.
    if len(examples) >= _MAX_SHOWN:
      break
  for reason, count in made.get('bad', {}).items():
    named = [e for e in examples if e.endswith(f'({reason})')]
    rows.append(['embed', reason, count, ', '.join(named[:_MAX_SHOWN])])
  path = clustered / 'clustering.json'
  skipped = files.read_json(path)['skipped_rows'] if path.exists() else 0
  if skipped:
    rows.append(['cluster', 'zero or not finite', skipped, ''])
  for path in (
    workdir / 'bad_keys.txt',
    *sorted(workdir.glob('not_finite_*.txt')),
  ):
    if path.exists():
      keys = path.read_text('utf-8-sig', errors='replace').splitlines()
      rows.append([path.name, '', len(keys), ', '.join(keys[:_MAX_SHOWN])])
  return rows


def config_fields(
  config: ml_collections.ConfigDict, preset: ml_collections.ConfigDict
) -> list[dict[str, Any]]:
  """Returns every field of a config with its value and that of the preset.

  Args:
    config: the config of the run.
    preset: the config of the preset.

  Returns:
    For each field its name `field`, its `value` and the value in the `preset`
    as JSON, and `changed`, True if they differ.
  """
  fields, before = (_flat(config_lib.to_dict(c)) for c in (config, preset))
  return [
    {
      'field': name,
      'value': json.dumps(value),
      'preset': json.dumps(before[name]) if name in before else 'not there',
      'changed': name not in before or before[name] != value,
    }
    for name, value in fields.items()
  ]


def _flat(value: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the fields of nested dicts by their dotted names."""
  out = {}
  for name, x in value.items():
    if isinstance(x, dict):
      out |= _flat(x, f'{prefix}{name}.')
    else:
      out[prefix + name] = x
  return out
