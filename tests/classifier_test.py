"""The sharded classifier against one dense product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import classifier
from mlcd_jax import config as config_lib
from mlcd_jax import losses
from mlcd_jax import sharding

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
BATCH, DIM, POSITIVES = 16, 12, 5


def make_problem(num_classes, seed=0):
  rng = np.random.default_rng(seed)
  weight = classifier.init(jax.random.key(seed), num_classes, DIM)['weight']
  embeddings = rng.normal(size=(BATCH, DIM)).astype(np.float32)
  labels = rng.integers(0, num_classes, (BATCH, POSITIVES)).astype(np.int32)
  labels[1, 2:] = -1  # Padded.
  labels[2, 1] = labels[2, 0]  # Repeated.
  labels[3] = -1  # None at all.
  return weight, embeddings, labels


def loss_config(**fields):
  config = config_lib.default().loss
  config.scale = 16.0
  config.update(fields)
  return config


def run(weight, embeddings, labels, num_classes, config, mesh):
  def f(weight, embeddings):
    loss_B = classifier.loss(
      weight,
      embeddings,
      jnp.asarray(labels),
      num_classes=num_classes,
      config=config,
      dtype=jnp.float32,
      key=jax.random.key(3),
      mesh=mesh,
    )
    return jnp.sum(loss_B), loss_B

  (_, loss), gradients = jax.jit(
    jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
  )(weight, embeddings)
  return np.asarray(loss), [np.asarray(g) for g in gradients]


def dense(weight, embeddings, labels, num_classes, config):
  """Float32 on one device, [B, C] logits and all."""
  layout = classifier.Layout(num_classes)

  def f(weight, embeddings):
    w = weight[layout.row_of(jnp.arange(num_classes))]
    w = w / jnp.linalg.norm(w, axis=1, keepdims=True)
    e = embeddings / jnp.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = e @ w.T
    positive = np.zeros((BATCH, num_classes), bool)
    for i, row in enumerate(labels):
      positive[i, row[row >= 0]] = True
    loss_B = losses.multi_label_loss(
      config.name,
      jnp.where(positive, config.scale * (cosines - config.margin), jnp.inf),
      jnp.where(positive, -jnp.inf, config.scale * cosines),
    )
    return jnp.sum(loss_B), loss_B

  (_, loss), gradients = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(
    weight, embeddings
  )
  return np.asarray(loss), [np.asarray(g) for g in gradients]


@pytest.mark.parametrize('mesh_shape', MESHES)
@pytest.mark.parametrize('name', ['mlcd', 'mlc'])
def test_sharded_equals_dense(name, mesh_shape):
  num_classes = 1_500  # Not divisible by the blocks, nor by the devices.
  problem = make_problem(num_classes)
  config = loss_config(name=name, sample_rate=1.0)
  loss, gradients = run(
    *problem, num_classes, config, sharding.make_mesh(*mesh_shape)
  )
  expected_loss, expected_gradients = dense(*problem, num_classes, config)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for found, expected in zip(gradients, expected_gradients):
    np.testing.assert_allclose(
      found, expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize('sample_rate', [0.5, 0.1, 0.001])
def test_sampled_is_the_same_on_every_mesh(sample_rate):
  num_classes = 1_500
  problem = make_problem(num_classes)
  config = loss_config(sample_rate=sample_rate)
  expected = run(*problem, num_classes, config, sharding.make_mesh(8, 1))
  for devices, shape in ((8, (2, 4)), (2, (1, 2)), (1, (1, 1))):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:devices])
    found = run(*problem, num_classes, config, mesh)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(found[1], expected[1]):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_unsampled_classes_have_no_gradient():
  num_classes = 1_500
  weight, embeddings, labels = make_problem(num_classes)
  config = loss_config(sample_rate=0.1)
  _, (gradient, _) = run(
    weight, embeddings, labels, num_classes, config, sharding.make_mesh(8, 1)
  )
  touched = np.flatnonzero(np.abs(gradient).sum(1))
  positives = set(labels[labels >= 0].tolist())
  layout = classifier.Layout(num_classes)
  classes = set(np.asarray(layout.class_of(touched)).tolist())
  assert positives <= classes
  assert 150 <= len(classes) <= 150 + len(positives)


def test_chunks_equal_the_whole(monkeypatch):
  num_classes = 1_500
  problem = make_problem(num_classes)
  config = loss_config(sample_rate=0.2)
  mesh = sharding.make_mesh(2, 4)
  whole = run(*problem, num_classes, config, mesh)
  # Room for a few rows of this device's share of the logits.
  monkeypatch.setattr(classifier, '_CHUNK_BYTES', 4 * 256 * 5)
  chunked = run(*problem, num_classes, config, mesh)
  np.testing.assert_allclose(chunked[0], whole[0], rtol=1e-6)
  for a, b in zip(chunked[1], whole[1]):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
  ('num_classes', 'num_sampled'),
  [(1_500, 150), (1_500, 1), (1_500, 1_499), (5_000, 77)],
)
def test_draw_is_exact_and_without_repeats(num_classes, num_sampled):
  layout = classifier.Layout(num_classes)

  @jax.jit
  def draw(key):
    return classifier._draw(
      key, layout, num_sampled, first=jnp.int32(0), num_local=layout.rows
    )

  seen = np.zeros(num_classes)
  for i in range(40):
    rows, drawn = draw(jax.random.key(i))
    classes = np.asarray(layout.class_of(rows))[np.asarray(drawn)]
    assert len(classes) == len(set(classes.tolist())) == num_sampled
    assert classes.max() < num_classes
    seen[classes] += 1
  expected = 40 * num_sampled / num_classes
  assert abs(seen[:750].mean() - expected) < 4 * np.sqrt(expected / 750)


def test_layout_spreads_classes_evenly():
  layout = classifier.Layout(1_500)
  rows = np.asarray(layout.row_of(jnp.arange(1_500)))
  np.testing.assert_array_equal(layout.class_of(rows), np.arange(1_500))
  assert layout.row_of(jnp.array(-1)) == -1
  per_device = np.bincount(rows // (layout.rows // 8))
  assert per_device.max() - per_device.min() <= layout.rows_per_block * 64
  first_eighty = np.bincount(rows[:80] // (layout.rows // 1_024))
  assert first_eighty.max() == 1  # Neighbours lie in different blocks.
