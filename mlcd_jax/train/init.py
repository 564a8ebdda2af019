"""Makes the state that training starts from, fresh or from given weights."""

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

# Attributes in which the loaded model must equal the one to be trained, each
# with the `model` field that sets it; '' = no field does.
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
  """Makes the state of step 0 as the `model.init_...` fields ask.

  The encoder is fresh, or loaded from model.init_from. Loaded positions are
  interpolated to the image size. The projection is fresh if the loaded one has
  another width. The classifier is fresh unless model.init_classifier names
  another start.

  Args:
    program: the program of the run.
    clusters: the folder of the clusters that serve as classes.

  Raises:
    UserError: the weights do not fit the model or the classifier.
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
  # opt_state can stay: its moments are zero for any parameters. The average
  # gets its own copy, because a step donates the buffers of the whole state.
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
  """Adapts loaded parameters to the model that is to be trained.

  Args:
    model: the encoder to train.
    source: the encoder that the parameters belong to.
    loaded: the parameters of `source`.
    params: the fresh parameters of the train state.

  Raises:
    UserError: the two encoders differ in more than image size and projection.
  """
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
  """Returns a padded weight [C, D] from another run or the cluster centers.

  Args:
    program: the program of the run.
    clusters: the folder of the clusters that serve as classes.
    workdir: the workdir that model.init_from names, or None.

  Raises:
    UserError: the run or the centers do not fit the classifier.
  """
  choice = f'model.init_classifier={program.config.model.init_classifier}'
  expected = program.abstract_state.params['classifier']['weight'].shape
  if program.config.model.init_classifier == 'kept':
    if workdir is None:
      raise errors.UserError(
        f'{choice}: {_FIELD} is no workdir, so it has no classifier; use '
        'fresh or centers'
      )
    found = load_lib.from_run(workdir, classifier=True)[2]
    theirs = found['config'].cluster.num_centers
    # Drops the padding for its mesh.
    weight = found['classifier'][: sampling.Layout(theirs).rows]
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
  weight = np.zeros(expected, np.float32)  # Padding rows are never drawn.
  rows = sampling.Layout(program.num_classes).row_of(np.arange(len(centers)))
  # The loss normalises rows, so their length only sets how far a step of the
  # optimizer turns them. Give them the expected length of fresh rows.
  weight[np.asarray(rows)] = centers * (
    classifier.INIT_STDDEV * expected[1] ** 0.5
  )
  return weight


def _placed(tree: Any, like: Any) -> Any:
  """Returns the arrays of `tree` with the types and shardings of `like`."""
  return jax.tree.map(
    lambda x, old: jax.make_array_from_callback(
      old.shape, old.sharding, np.asarray(x, old.dtype).__getitem__
    ),
    tree,
    like,
  )
