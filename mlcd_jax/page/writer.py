"""Writer of report.html, which it updates while the run goes on."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import logging
import pathlib
import time
from typing import Any

from jax.sharding import Mesh
import ml_collections

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import table
from mlcd_jax.page import curves
from mlcd_jax.page import render
from mlcd_jax.page import sections
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files

_log = logging.getLogger(__name__)

NAME = 'report.html'
# The folder beside the page for data that is made once.
_FOLDER = 'report'
_PATCHES = 'patches.json'
# The age at which training replaces the page.
_EVERY_SECONDS = 60.0


class Page:
  """The report page of one run, which process 0 writes."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    folders: Mapping[str, pathlib.Path],
    mesh: Mesh,
    preset: tuple[str, ml_collections.ConfigDict] | None,
  ):
    """Removes leftovers of killed runs; it writes no page yet.

    Args:
      config: the config of the run.
      workdir: the folder for the page.
      folders: the folders of the stages by name, in order.
      mesh: the mesh of all devices.
      preset: the name and fields of the preset that the config was made from;
        None compares it with the defaults.
    """
    self._config = config
    self._workdir = workdir
    self._folders = folders
    self._mesh = mesh
    self._preset = preset or ('the defaults', config_lib.default())
    self._kept = workdir / _FOLDER
    self._running = ''
    self._failed = ''
    # The functions of parts that failed once. They would fail again at every
    # refresh and fill the log.
    self._left_out = set()
    # Infinitely old, so that the first refresh writes.
    self._written = -float('inf')
    if distributed.is_main():
      files.remove_leftovers(workdir, f'.{NAME}.*.tmp')
      files.remove_leftovers(self._kept)

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Writes the page before and after the block, even if the block fails.

    Args:
      name: the name of the stage that the block runs.
    """
    start = time.monotonic()
    self._running = name
    self.write()
    try:
      yield
    except errors.Stopped as e:
      self._failed = str(e)
      raise
    except BaseException as e:
      self._failed = f'{name} ended: {str(e) or type(e).__name__}'
      raise
    finally:
      self._running = ''
      self._add_seconds(name, time.monotonic() - start)
      self.write()

  def refresh(self, every_seconds: float = _EVERY_SECONDS) -> None:
    """Writes the page if the last one is older than `every_seconds`."""
    if time.monotonic() - self._written > every_seconds:
      self.write()

  def show_patches(
    self, encoder: encoders.Encoder, source: sources.Source
  ) -> None:
    """Makes the pictures of patch features; all processes must call it.

    Args:
      encoder: the encoder of the run.
      source: the source of the images.
    """
    found = self._part(sections.patch_colours, encoder, source)
    if found and distributed.is_main():
      files.write_json(self._kept / _PATCHES, found)

  def finish(self) -> None:
    """Writes the page if a manifest is newer.

    That is the case if an earlier run was killed between the two.
    """
    path = self._workdir / NAME
    written = path.stat().st_mtime_ns if path.exists() else -1
    made = [folder / manifests.NAME for folder in self._folders.values()]
    if any(m.exists() and m.stat().st_mtime_ns > written for m in made):
      self.write()

  def write(self) -> None:
    """Writes the page from process 0; a failure is only a warning."""
    if not distributed.is_main():
      return
    try:
      page = render.render(self._data())
      with files.atomic(self._workdir / NAME) as temporary:
        temporary.write_text(page, encoding='utf-8')
    except Exception as e:  # A broken page must not end a run.
      _log.warning('%s is not written: %s: %s', NAME, type(e).__name__, e)
    self._written = time.monotonic()

  def _data(self) -> dict[str, Any]:
    """Returns the data of the whole page; page.js reads it."""
    c, embedded, clustered = (
      self._config,
      self._folders['embed'],
      self._folders['cluster'],
    )
    stages = self._stages()
    read = curves.read(self._workdir)
    clustering = clustered / 'clustering.json'
    results = self._workdir / 'results.json'
    patches = self._kept / _PATCHES
    return {
      'title': f'MLCD: {self._workdir.absolute().name}',
      'workdir': str(self._workdir),
      'written': time.time(),
      'status': self._status(stages, read),
      'summary': self._summary(read),
      'stages': stages,
      'curves': read,
      'clustering': files.read_json(clustering)
      if clustering.exists()
      else None,
      'clusters': self._part(
        sections.browsers,
        c,
        self._kept / 'browsers.json',
        embedded=embedded,
        clustered=clustered,
      ),
      'results': files.read_json(results) if results.exists() else {},
      'encoders': table.ENCODERS,
      'patches': files.read_json(patches) if patches.exists() else [],
      'bad': sections.bad_data(
        self._workdir, embedded=embedded, clustered=clustered
      ),
      'preset': self._preset[0],
      'config': sections.config_fields(c, self._preset[1]),
    }

  def _part(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Makes a part of the page.

    Args:
      make: the function that makes the part.
      *args: the positional arguments of `make`.
      **kwargs: the keyword arguments of `make`.

    Returns:
      The part, or None if `make` failed now or in an earlier call.
    """
    if make.__name__ in self._left_out:
      return None
    try:
      return make(*args, **kwargs)
    except Exception as e:  # The page is useful without this part.
      self._left_out.add(make.__name__)
      said = f'{type(e).__name__}: {e}'
      _log.warning('%s is without %s: %s', NAME, make.__name__, said)
      return None

  def _stages(self) -> list[dict[str, Any]]:
    """Returns the `name`, the `state` and the `seconds` of every stage."""
    seconds = self._seconds()
    out = []
    for name, folder in self._folders.items():
      found = sections.manifest(folder)
      state = 'done' if found.get('complete') else 'begun' if found else ''
      if name == self._running:
        state = 'running'
      # With cluster.path the first stages are those of another run.
      if folder.parent != self._workdir:
        state = f'{state}, in {folder.parent}'
      out.append({'name': name, 'state': state, 'seconds': seconds.get(name)})
    return out

  def _status(
    self, stages: list[dict[str, Any]], read: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the line at the top of the page.

    Args:
      stages: the value of `_stages`.
      read: the curves.
    """
    done = all(stage['state'].startswith('done') for stage in stages)
    if self._failed:
      text = self._failed
    elif self._running:
      text = f'{self._running} is running'
      if self._running == 'train' and read['step']:
        text += f', step {read["step"][-1]:,}'
    else:
      text = 'finished' if done else 'not finished'
    return {'text': text, 'done': done, 'failed': bool(self._failed)}

  def _summary(self, read: Mapping[str, Any]) -> list[list[Any]]:
    """Returns the rows [name, value] of the summary, without unknown values."""
    c = self._config
    made, clustered = (
      sections.manifest(self._folders[stage]).get('result', {})
      for stage in ('embed', 'cluster')
    )
    rows = [
      ['model', f'{c.model.variant}, {c.model.image_size} pixels'],
      ['data', f'{c.data.source} {c.data.path} {c.data.split}'],
      ['images', made.get('num_records')],
      ['embedder', f'{c.embed.embedder} {c.embed.path}'],
      ['clusters', clustered.get('num_centers', c.cluster.num_centers)],
      ['labels an image', c.loss.num_positives],
      ['loss', c.loss.name],
      ['batch size', c.train.batch_size],
      ['devices', sharding.describe(self._mesh)],
    ]
    if read['step']:
      rows.append(['last step logged', read['step'][-1]])
      for name in ('loss', 'images_per_second'):
        values = [
          v for v in read['values'].get(f'train/{name}', ()) if v is not None
        ]
        if values:
          rows.append([name.replace('_', ' '), values[-1]])
    return [row for row in rows if row[1] is not None]

  def _seconds(self) -> dict[str, float]:
    """Reads the seconds of every stage over all invocations so far."""
    path = self._kept / 'seconds.json'
    return files.read_json(path) if path.exists() else {}

  def _add_seconds(self, name: str, seconds: float) -> None:
    """Adds to the time of a stage, which earlier invocations may have begun."""
    if not distributed.is_main():
      return
    # The time is not worth an error in the run.
    with contextlib.suppress(OSError, errors.UserError):
      kept = self._seconds()
      kept[name] = round(kept.get(name, 0) + seconds, 3)
      files.write_json(self._kept / 'seconds.json', kept)
