"""Finds the centers of the embeddings: centers.npy and clustering.json."""

import json
import logging
import pathlib
import time
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from mlcd_jax import kmeans
from mlcd_jax import unit
from mlcd_jax.cluster import split
from mlcd_jax.embed import row_files
from mlcd_jax.runtime import chips
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.runtime import progress as progress_lib

_log = logging.getLogger(__name__)

# The state after the last complete iteration; removed once the centers exist.
_STATE = 'unfinished.npz'

# Prefix of the assigner's arrays in that file.
_ASSIGNER = 'assigner_'

# The most bad rows that the warning names.
_MAX_NAMED = 20

# Two centers with a cosine above this count as near duplicates.
_NEAR_DUPLICATE = 0.99


class _State(NamedTuple):
  """The state of the clustering between iterations.

  Attributes:
    fit: the clustering so far.
    held_out: the mean cosine of the held-out rows to their nearest center,
      before each iteration and after the last.
    relabelled: the share of the held-out rows that got another center, for each
      iteration.
    levels: the report of `kmeans.two_level.fit`; {} for flat clustering.
  """

  fit: kmeans.Fit
  held_out: list[float]
  relabelled: list[float]
  levels: dict[str, Any]


def run(
  config: ml_collections.ConfigDict,
  rows: row_files.Sharded,
  folder: pathlib.Path,
  mesh: Mesh,
) -> None:
  """Writes centers.npy and clustering.json, continuing an unfinished run.

  Args:
    config: the config of the run.
    rows: the embeddings [N, D].
    folder: the folder of the cluster stage.
    mesh: the mesh of all devices.

  Raises:
    UserError: there are fewer usable rows than centers.
  """
  chosen = split.choose(rows, config)
  training = split.Training(rows, chosen.held_out)
  measured = rows.take(chosen.held_out)
  try:
    state = _read_state(folder / _STATE)
    if state is None:
      state = _start(config, rows, training, chosen, mesh)
      if state.levels:
        _write_state(folder / _STATE, state)
    state = _iterate(config, state, training, measured, folder / _STATE, mesh)
  except ValueError as e:
    raise errors.UserError(f'cluster.num_centers: {e}') from e
  bad = chosen.held_out[~unit.unit_rows(measured).any(1)].tolist()
  fit = state.fit._replace(skipped=state.fit.skipped + len(bad))
  bad = sorted([*bad, *map(training.row, fit.bad_rows)])[:_MAX_NAMED]
  if bad:
    _log.warning(
      '%d zero or non-finite rows were left out: %s',
      fit.skipped,
      ', '.join('{} row {}'.format(*rows.locate(row)) for row in bad),
    )
  summary = _summary(
    state._replace(fit=fit), rows.shape, len(chosen.held_out), mesh
  )
  if distributed.is_main():
    files.write_json(folder / 'clustering.json', summary)
    files.write_npy(folder / 'centers.npy', fit.centers)
    (folder / _STATE).unlink(missing_ok=True)
  distributed.barrier('centers')


def _start(
  config: ml_collections.ConfigDict,
  rows: row_files.Sharded,
  training: split.Training,
  chosen: split.Chosen,
  mesh: Mesh,
) -> _State:
  """Returns the state before the first flat iteration."""
  sample = rows.take(chosen.first)
  usable = unit.unit_rows(sample).any(1)
  # Zero and non-finite rows go last, where they become centers only if there
  # are too few usable rows.
  sample = np.concatenate([sample[usable], sample[~usable]])
  centers, levels = sample[: config.cluster.num_centers], {}
  if config.cluster.levels:
    if jax.process_count() > 1:
      raise errors.UserError(
        'cluster.levels is for one process; start one, or set () for flat'
      )
    centers, levels = kmeans.two_level.fit(
      training,
      tuple(config.cluster.levels),
      sample=sample,
      iterations=config.cluster.iterations,
      seed=config.seed,
      mesh=mesh,
    )
  nothing = np.zeros(len(centers), np.int32)
  return _State(kmeans.Fit(centers, [], nothing, [], 0, []), [], [], levels)


def _iterate(
  config: ml_collections.ConfigDict,
  state: _State,
  training: split.Training,
  measured: np.ndarray,
  path: pathlib.Path,
  mesh: Mesh,
) -> _State:
  """Runs the flat iterations and saves the state to `path` after each."""
  num_points, dim = training.shape
  num_centers = config.cluster.num_centers
  iterations = config.cluster.iterations
  if config.cluster.levels:
    iterations = config.cluster.repair_iterations
  done = len(state.fit.objective)
  if done:
    _log.info('cluster: continuing after %d iterations', done)
  if len(measured):
    labels, objective = _measure(measured, state.fit.centers, mesh)
    if not done:
      state = state._replace(held_out=[objective])
  progress = progress_lib.Progress(
    'cluster',
    iterations * num_points,
    unit='points',
    done=done * num_points,
    flops=2 * num_centers * dim,
    peak_flops=chips.peak_flops(mesh.devices.flat),
  )
  started = time.monotonic()
  for fit in kmeans.iterate(
    training,
    num_centers,
    iterations=iterations,
    init=state.fit if done else state.fit.centers,
    tolerance=config.cluster.tolerance,
    method=config.cluster.method,
    mesh=mesh,
  ):
    state = state._replace(fit=fit)
    if len(measured):
      before = labels
      labels, objective = _measure(measured, fit.centers, mesh)
      state = state._replace(
        held_out=[*state.held_out, objective],
        relabelled=[*state.relabelled, float(np.mean(labels != before))],
      )
    _write_state(path, state)
    _log_pass(state, iterations, time.monotonic() - started)
    progress.update(len(fit.objective) * num_points)
    started = time.monotonic()
  return state


def _log_pass(state: _State, iterations: int, seconds: float) -> None:
  """Logs one line for the last pass."""
  fit = state.fit
  parts = [f'objective {fit.objective[-1]:.5f}']
  if state.relabelled:
    parts.append(f'{state.relabelled[-1]:.1%} relabelled')
  if fit.reseeded[-1]:
    parts.append(f'{fit.reseeded[-1]} empty clusters reseeded')
  parts.append(f'{seconds:.2f} s')
  _log.info(
    'cluster: pass %d of %d: %s',
    len(fit.objective),
    iterations,
    ', '.join(parts),
  )


def _measure(
  rows: np.ndarray, centers: np.ndarray, mesh: Mesh
) -> tuple[np.ndarray, float]:
  """Returns each row's nearest center and the mean cosine of usable rows."""
  labels, cosines = kmeans.nearest_centers(rows, centers, 1, mesh=mesh)
  # A zero or non-finite row has the cosine 0 to every center.
  usable = max(1, np.count_nonzero(cosines))
  return labels[:, 0], float(cosines.sum(dtype=np.float64) / usable)


def _write_state(path: pathlib.Path, state: _State) -> None:
  """Writes the state from process 0; all processes wait for it."""
  if distributed.is_main():
    fit = state.fit._asdict()
    assigner_state = fit.pop('assigner_state')
    files.write_npz(
      path,
      held_out=np.asarray(state.held_out),
      relabelled=np.asarray(state.relabelled),
      levels=np.asarray(json.dumps(state.levels)),
      **{f'fit_{k}': np.asarray(v) for k, v in fit.items()},
      **{_ASSIGNER + k: v for k, v in assigner_state.items()},
    )
  distributed.barrier('clustering state')


def _read_state(path: pathlib.Path) -> _State | None:
  """Reads the state of an unfinished clustering; None if there is none.

  Raises:
    UserError: an earlier version of this package wrote the file.
    RunError: the processes see different files.
  """
  if not distributed.decide('clustering state', path.exists):
    return None
  arrays = files.read_npz(path)
  if 'fit_assigner' not in arrays:
    raise errors.UserError(
      f'{path} is of an earlier version; delete it to cluster anew'
    )
  state = _parse(arrays)
  done = len(state.fit.objective)
  distributed.check_same('clustering done', lambda: done, str(path))
  return state


def _parse(arrays: dict[str, np.ndarray]) -> _State:
  """Returns the state that the arrays of the file hold."""
  return _State(
    kmeans.Fit(
      centers=arrays['fit_centers'],
      objective=arrays['fit_objective'].tolist(),
      counts=arrays['fit_counts'],
      reseeded=arrays['fit_reseeded'].tolist(),
      skipped=int(arrays['fit_skipped']),
      bad_rows=arrays['fit_bad_rows'].tolist(),
      assigner=str(arrays['fit_assigner']),
      assigner_state={
        name.removeprefix(_ASSIGNER): value
        for name, value in arrays.items()
        if name.startswith(_ASSIGNER)
      },
    ),
    held_out=arrays['held_out'].tolist(),
    relabelled=arrays['relabelled'].tolist(),
    levels=json.loads(str(arrays['levels'])),
  )


def _summary(
  state: _State, shape: tuple[int, int], held_out: int, mesh: Mesh
) -> dict[str, Any]:
  """Returns the content of clustering.json."""
  fit = state.fit
  counts = fit.counts.astype(np.float64)
  return {
    'num_points': shape[0],
    'dim': shape[1],
    'num_centers': len(counts),
    'iterations': len(fit.objective),
    'objective': fit.objective,
    'held_out_rows': held_out,
    'held_out_objective': state.held_out,
    'relabelled': state.relabelled,
    'reseeded': fit.reseeded,
    'skipped_rows': fit.skipped,
    'near_duplicate_centers': _near_duplicates(fit.centers, mesh),
    # The imbalance factor of faiss: 1 if all clusters have the same size.
    'imbalance': float(
      len(counts) * np.square(counts).sum() / counts.sum() ** 2
    ),
    'size_percentiles': {
      str(p): float(np.percentile(counts, p))
      for p in (0, 1, 10, 50, 90, 99, 100)
    },
    **state.levels,
  }


def _near_duplicates(centers: np.ndarray, mesh: Mesh) -> int:
  """Counts the centers whose nearest other center is a near duplicate."""
  if len(centers) < 2:
    return 0
  _, cosines = kmeans.nearest_centers(centers, centers, 2, mesh=mesh)
  return int(np.sum(cosines[:, 1] > _NEAR_DUPLICATE))
