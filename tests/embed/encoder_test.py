"""A run's own encoder as the embedder."""

import jax
import numpy as np
import pytest

from mlcd_jax import manifests
from mlcd_jax import stages
from mlcd_jax.data import sources
from mlcd_jax.data import transforms
from mlcd_jax.embed import embedders
from mlcd_jax.embed import encoder
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import pinned as pinned_lib


@pytest.fixture(name='trained', scope='module')
def fixture_trained(tmp_path_factory):
  return tmp_path_factory.mktemp('trained')


def train(config, workdir, steps):
  """Trains so many steps of four; 0 = the rest."""
  config = config.copy_and_resolve_references()
  config.embed.embedder, config.embed.path = 'hog', ''
  config.cluster.iterations = 2
  config.train.steps, config.train.stop_after_steps = 4, steps
  stages.run(config, workdir, ('embed', 'cluster', 'train'))


def test_a_run_embeds_for_the_next_one(trained, tiny_config, tmp_path):
  train(tiny_config, trained, 2)
  tiny_config.embed.embedder = 'checkpoint'
  tiny_config.embed.path = str(trained)
  stages.run(tiny_config, tmp_path, ('embed', 'cluster'))
  manifest = manifests.load(tmp_path / 'embeddings')
  rows = shards.open_made(manifest)
  assert rows.shape == (300, tiny_config.model.embedding_dim)
  assert manifest.notes['step'] == 2

  model, params, _ = load_lib.from_run(trained)
  source = sources.make(tiny_config.data)
  embedder = embedders.load_embedder(manifest)
  images = np.stack(
    [
      embedder.prepare(transforms.decode(source[i]['image']))
      for i in range(300)
    ]
  )
  assert images.shape[1:] == (28, 28, 3)
  expected = jax.jit(model.apply)({'params': params}, images)['embedding']
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(rows[:], expected, atol=2e-3)

  # Training goes on: what it would now embed is something else.
  train(tiny_config, trained, 0)
  with pytest.raises(errors.UserError, match='checkpoint, 4, is not.*with, 2'):
    embedders.load_embedder(manifest)


def test_size_and_weights_are_checked(trained, tiny_config, tmp_path):
  with pytest.raises(errors.UserError, match='nothing is trained'):
    pinned_lib.pin_run(str(tmp_path))
  pinned = pinned_lib.pin_run(str(trained))
  options = dict(batch_size=4, dtype='float32')
  larger = encoder.from_checkpoint(pinned, image_size=56, **options)
  assert larger.image_size == 56
  assert larger.batch_rows == 4 * jax.local_device_count()
  assert larger(np.zeros((3, 56, 56, 3), np.uint8)).shape == (3, 32)
  with pytest.raises(errors.UserError, match='embed.image_size=7 is less'):
    encoder.from_checkpoint(pinned, image_size=7, **options)
