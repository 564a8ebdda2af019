"""The cells of a study as runs of mlcd_jax, and what was found in them."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import pathlib
import runpy
from typing import Any

import ml_collections

from benchmarks import emoji
from benchmarks import paired
from benchmarks import studies
from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.evaluate import encoders
from mlcd_jax.runtime import files

_log = logging.getLogger('mlcd_jax.study')

# Of single runs; a table's intervals are over seeds.
_INTERVALS = ('_low', '_high', '_count')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run: what `point` sets beside the study's settings, and a seed."""

  name: str  # Of the study.
  study: studies.Study
  point: Mapping[str, Any]
  seed: int
  previous: 'Cell | None' = None

  def __str__(self) -> str:
    fields = [f'{k}={v}' for k, v in self.point.items()]
    return ' '.join([self.name, *fields, f'seed={self.seed}'])

  def record(self) -> dict[str, Any]:
    """Returns the entry of study.json, without the results."""
    config = self.study.fields(self.point)
    return {'study': self.name, 'config': config, 'seed': self.seed}


def cells(name: str, study: studies.Study) -> Iterator[Cell]:
  """Yields a study's cells, all of a seed before the next."""
  for seed in study.seeds:
    previous = None
    for point in study.points():
      previous = Cell(name, study, point, seed, previous)
      yield previous


class Runs:
  """The runs of one workdir.

  Attributes:
    path: of study.json.
  """

  def __init__(self, workdir: pathlib.Path, data: str):
    """Takes the folder of all runs, and where the emoji are."""
    self._workdir = workdir
    self._data = data
    self.path = workdir / 'study.json'

  def records(self) -> list[dict[str, Any]]:
    """Returns the entries of study.json so far."""
    return files.read_json(self.path) if self.path.exists() else []

  def run(self, cell: Cell) -> bool:
    """Runs a cell that was not run yet; False where another process does."""
    with _claimed(self.folder(cell)) as mine:
      if mine and not self._done(cell):
        _log.info('study: %s in %s', cell, self.folder(cell))
        self._train(cell)
        self._add(cell, *self._scores(cell))
    return mine

  def folder(self, cell: Cell) -> pathlib.Path:
    """The cell's workdir, the same for the same config in two studies."""
    config = self._config(cell)
    made_by = _digest(config_lib.to_dict(config))
    return self._workdir / f'run-{made_by}'

  def _done(self, cell: Cell) -> bool:
    wanted = cell.record()
    return any(wanted.items() <= record.items() for record in self.records())

  def _scores(
    self, cell: Cell
  ) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the scores, and for 'paired' those without groups of images."""
    folder = self.folder(cell)
    if cell.study.score == 'run':
      return _scores_of_run(folder), {}
    mesh = sharding.make_mesh()
    encoder = encoders.load(str(folder), mesh)
    if cell.study.score == 'paired':
      return paired.score(self._config(cell), encoder, mesh)
    found = {'trained': encoder}
    if cell.study.baselines:
      found |= emoji.baselines()
    return {
      f'{name}/{metric}': value
      for name, encoder in found.items()
      for metric, value in emoji.score(encoder, name, self._data).items()
    }, {}

  def _train(self, cell: Cell) -> None:
    if '{previous}' in cell.point.values():
      with _claimed(self.folder(cell.previous), wait=True):
        self._train(cell.previous)
    config = self._config(cell)
    config.cluster.path = str(self._clusters(config))
    wanted = ('train', 'evaluate') if cell.study.baselines else ('train',)
    stages.run(config, self.folder(cell), wanted)

  def _clusters(self, config: ml_collections.ConfigDict) -> pathlib.Path:
    """A workdir with the config's clusters, made where it is not there."""
    fields = stages.fields(config, 'embed')
    embedded = self._workdir / f'embeddings-{_digest(fields)}'
    fields |= stages.fields(config, 'cluster')
    clustered = self._workdir / f'clusters-{_digest(fields)}'
    with _claimed(clustered, wait=True):
      with _claimed(embedded, wait=True):
        stages.run(config, embedded, ('embed',))
      clustered.mkdir(exist_ok=True)
      for name in ('embeddings', 'views'):
        link, folder = clustered / name, embedded.resolve() / name
        if folder.exists() and not link.exists():
          link.symlink_to(folder)
      stages.run(config, clustered, ('cluster',))
    return clustered

  def _config(self, cell: Cell) -> ml_collections.ConfigDict:
    path, _, preset = cell.study.config.partition(':')
    config = runpy.run_path(path)['get_config'](preset or None)
    for field, value in cell.study.fields(cell.point).items():
      if isinstance(value, str):
        value = value.replace('{data}', self._data)
        if '{previous}' in value:
          value = value.replace('{previous}', str(self.folder(cell.previous)))
      if isinstance(value, list):
        value = tuple(value)
      config.update_from_flattened_dict({field: value})
    config.seed = cell.seed
    if cell.study.score == 'run':
      config.evaluate.every_steps = config.train.steps
    return config

  def _add(
    self,
    cell: Cell,
    results: dict[str, float],
    without: dict[str, list[float]],
  ) -> None:
    results = {
      k: round(v, 5)
      for k, v in sorted(results.items())
      if v is not None and not k.endswith(_INTERVALS)
    }
    with _claimed(self.path, wait=True):
      record = cell.record() | {'results': results}
      if without:
        record['without'] = without
      files.write_json(self.path, [*self.records(), record])


def _scores_of_run(folder: pathlib.Path) -> dict[str, float]:
  """Returns the scores of results.json, or else those made in training."""
  if (folder / 'results.json').exists():
    return files.read_json(folder / 'results.json')
  lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  *_, last = (
    line for line in lines if any('evaluate/' in name for name in line)
  )
  return {
    name.replace('evaluate/', 'trained/'): value
    for name, value in last.items()
    if name.startswith('evaluate/')
  }


@contextlib.contextmanager
def _claimed(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
  """Yields whether this process holds a path's lock, which a dead one drops."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.with_suffix('.lock'), 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
    else:
      yield True


def _digest(fields: dict[str, Any]) -> str:
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
