"""The state that training starts from: fresh, or from weights."""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlcd_jax import models
from mlcd_jax.models import positions
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.train import classifier
from mlcd_jax.train import sampling
from mlcd_jax.train import step
from mlcd_jax.weights import load as load_lib

_log = logging.getLogger(__name__)

_FIELD = 'model.init_from'

# What must be alike in both models, where one has it, and the field that sets
# it in ours.
_ALIKE = {
  'width': 'variant',
  'depth': 'variant',
  'blocks': 'variant',
  'heads': 'variant',
  'mlp_dim': 'variant',
  'patch_size': 'variant',
  'pooling': 'pooling',
  'position': 'position',
  'activation': 'activation',
  'pre_norm': '',
  'norm_epsilon': '',
  'mean': '',
  'std': '',
}


def make(program: step.Program, *, clusters: pathlib.Path) -> step.TrainState:
  """Makes the state of step 0 as the `model.init_...` fields say.

  Positions are interpolated to the image size. A projection of another width
  stays fresh, and so does the classifier unless model.init_classifier says
  otherwise.

  Args:
    program: of the run.
    clusters: folder of the clusters that are trained on.

  Raises:
    UserError: the weights are not of such a model or classifier.
  """
  config = program.config.model
  state = program.init()
  params, workdir = dict(state.params), None
  if config.init_from:
    source, variables, workdir = load_lib.load(config.init_from, _FIELD)
    encoder = _adapted(program.model, source, variables['params'], params)
    params['encoder'] = _placed(encoder, params['encoder'])
  if config.init_classifier != 'fresh':
    weight = _classifier(program, clusters, workdir)
    params['classifier'] = _placed({'weight': weight}, params['classifier'])
  if not config.init_from and config.init_classifier == 'fresh':
    return state
  # The optimizer's moments are zero whatever the parameters are.
  return state.replace(
    params=params,
    ema=jax.tree.map(jnp.copy, params['encoder']) if state.ema else {},
  )


def _adapted(
  model: models.Encoder,
  source: models.Encoder,
  loaded: dict[str, Any],
  params: Any,
) -> dict[str, Any]:
  """The encoder's parameters, with positions for its own size."""
  if getattr(source, 'patch_bias', False):
    raise errors.UserError(
      f"{_FIELD}: SigLIP's and DINOv2's towers are embedders only; start from "
      "CLIP's or MLCD's, or from a run"
    )
  for name, field in _ALIKE.items():
    ours, theirs = (getattr(m, name, None) for m in (model, source))
    if ours != theirs:
      raise errors.UserError(
        f'{_FIELD}: its {name} is {theirs!r}, this model '
        f'has {ours!r}; '
        + (f'set model.{field}' if field else 'no field sets that')
      )
  encoder = dict(loaded)
  fresh = params['encoder']
  if 'positions' in fresh:
    grid, own_grid = (
      (m.image_size // m.patch_size,) * 2 for m in (model, source)
    )
    encoder['positions'] = positions.interpolate(
      jnp.asarray(loaded['positions'][0]),
      grid,
      own_grid,
      extra=model.has_class_token,
    )[None]
    if grid != own_grid:
      _log.info('train: positions interpolated from %d to %d pixels',
                source.image_size, model.image_size)  # fmt: skip
  if source.embedding_dim != model.embedding_dim:
    _log.info(
      'train: the projection is fresh, %s has %s',
      _FIELD,
      f'one to {source.embedding_dim}' if source.embedding_dim else 'none',
    )
    encoder['projection'] = fresh['projection']
  return encoder


def _classifier(
  program: step.Program,
  clusters: pathlib.Path,
  workdir: pathlib.Path | None,
) -> np.ndarray:
  """The weight [C, D], padded, kept from a run or made of the centers."""
  choice = f'model.init_classifier={program.config.model.init_classifier}'
  expected = program.abstract_state.params['classifier']['weight'].shape
  if program.config.model.init_classifier == 'kept':
    if workdir is None:
      raise errors.UserError(
        f'{choice}: {_FIELD} is no workdir, so it has no classifier; use '
        'fresh or centers'
      )
    found = load_lib.from_run(workdir, classifier=True)[2]
    theirs = sampling.Layout(found['config'].cluster.num_centers).rows
    weight = found['classifier'][:theirs]  # Without its mesh's padding.
    needed = (sampling.Layout(program.num_classes).rows, expected[1])
    if weight.shape != needed:
      raise errors.UserError(
        f'{choice}: {_FIELD} has class centers {list(weight.shape)}, this run '
        f'needs {list(needed)}; use fresh or centers'
      )
    return np.pad(weight, ((0, expected[0] - len(weight)), (0, 0)))
  centers = files.read_npy(clusters / 'centers.npy')
  if centers.shape[1] != expected[1]:
    raise errors.UserError(
      f'{choice}: the cluster centers have {centers.shape[1]} columns, '
      f'model.embedding_dim={expected[1]}; make them equal, or use fresh'
    )
  weight = np.zeros(expected, np.float32)  # Padding is never read.
  rows = sampling.Layout(program.num_classes).row_of(np.arange(len(centers)))
  # As long as fresh rows are, on which the optimizer's step depends.
  weight[np.asarray(rows)] = centers * (
    classifier.INIT_STDDEV * expected[1] ** 0.5
  )
  return weight


def _placed(tree: Any, like: Any) -> Any:
  """Arrays with the types and shardings of others."""
  return jax.tree.map(
    lambda x, old: jax.make_array_from_callback(
      old.shape, old.sharding, np.asarray(x, old.dtype).__getitem__
    ),
    tree,
    like,
  )
