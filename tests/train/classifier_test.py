"""The sharded classifier against the paper's equations in float64 numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.train import classifier
from mlcd_jax.train import sampling

BATCH, DIM, POSITIVES = 16, 12, 5
# What is compiled once and run once need not be fast.
_QUICK = {'xla_backend_optimization_level': 0}


def make_problem(num_classes, positives=POSITIVES, seed=0):
  rng = np.random.default_rng(seed)
  weight = classifier.init(jax.random.key(seed), num_classes, DIM)['weight']
  embeddings = rng.normal(size=(BATCH, DIM)).astype(np.float32)
  labels = rng.integers(0, num_classes, (BATCH, positives)).astype(np.int32)
  labels[3] = -1  # None at all.
  if positives > 1:
    labels[1, 2:] = -1  # Padded.
    labels[2, 1] = labels[2, 0]  # Repeated.
  return weight, embeddings, labels


def loss_config(**fields):
  config = config_lib.default().loss
  config.scale = 16.0
  config.update(fields)
  return config


def make_mesh(data, fsdp):
  return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def run(weight, embeddings, labels, num_classes, config, mesh):
  """Losses [B], and the gradients of their sum."""

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

  compiled = jax.jit(
    jax.value_and_grad(f, argnums=(0, 1), has_aux=True),
    compiler_options=_QUICK,
  )
  (_, loss), gradients = compiled(weight, embeddings)
  return np.asarray(loss), [np.asarray(g) for g in gradients]


def draw(num_classes, config, labels, key):
  """The classes drawn, by one device that owns all."""
  layout = sampling.Layout(num_classes)
  rows_BP = layout.row_of(jnp.asarray(labels))
  drawn = sampling.draw(
    key,
    layout,
    rows_BP,
    config=config,
    first=jnp.int32(0),
    num_local=layout.rows,
  )
  return np.asarray(layout.class_of(np.flatnonzero(drawn)))


def log_sum(x):
  return np.log(np.sum(np.exp(x)))


def reference(weight, embeddings, labels, drawn, config):
  """Losses [B] by Eqs. 3 to 5, of classes in their own order, float64."""

  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  def positive_logit(cosine):
    if config.margin_type == 'arcface':
      return config.scale * np.cos(np.arccos(cosine) + config.margin)
    return config.scale * (cosine - config.margin)

  def negative_logit(cosine):
    if config.interclass_filter:
      cosine = np.where(cosine > config.interclass_filter, 0.0, cosine)
    return config.scale * cosine

  out = []
  for cosines, own in zip(unit(embeddings) @ unit(weight).T, labels):
    own = np.unique(own[own >= 0])
    p = positive_logit(cosines[own])
    n = negative_logit(cosines[np.setdiff1d(drawn, own)])
    if config.name == 'mlcd':  # In its joint form.
      a, b = np.exp(-p).sum(), np.exp(n).sum()
      out.append(np.log(1 + a * b + a + b))
    elif config.name in ('mlc', 'softmax'):
      out.append(np.log(1 + np.exp(n).sum() * np.exp(-p).sum()))
    elif config.name == 'mean_softmax':
      slots = []
      for k, s in zip(own, p):
        rest = negative_logit(cosines[np.setdiff1d(drawn, [k])])
        slots.append(log_sum(np.append(rest, s)) - s)
      out.append(np.mean(slots) if slots else 0.0)
    elif config.name == 'sigmoid':
      out.append(np.log1p(np.exp(-p)).sum() + np.log1p(np.exp(n)).sum())
  return np.array(out)


def check_against_reference(num_classes, config, mesh, *, positives=POSITIVES):
  weight, embeddings, labels = make_problem(num_classes, positives)
  if config.interclass_filter:  # So that something is filtered.
    embeddings[5] = weight[7]
  drawn = draw(num_classes, config, labels, jax.random.key(3))
  rows = np.asarray(sampling.Layout(num_classes).row_of(np.arange(num_classes)))
  found, gradients = run(weight, embeddings, labels, num_classes, config, mesh)
  args = np.float64(weight)[rows], np.float64(embeddings)
  expected = reference(*args, labels, drawn, config)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)

  found_gradients = np.float64(gradients[0])[rows], np.float64(gradients[1])
  padding = np.setdiff1d(np.arange(len(weight)), rows)
  assert not gradients[0][padding].any()
  rng = np.random.default_rng(1)
  for i in range(2):
    scale = np.linalg.norm(found_gradients[i])
    for _ in range(3):  # The derivative along a few directions.
      v = rng.normal(size=args[i].shape) * (np.abs(found_gradients[i]) > 0)
      v /= np.linalg.norm(v)
      step = 1e-5 * np.linalg.norm(args[i]) / np.sqrt(len(args[i]))
      moved = [
        reference(
          *(a + s * step * v if i == j else a for j, a in enumerate(args)),
          labels,
          drawn,
          config,
        ).sum()
        for s in (1, -1)
      ]
      np.testing.assert_allclose(
        np.sum(found_gradients[i] * v),
        (moved[0] - moved[1]) / (2 * step),
        atol=1e-4 * scale,
      )


def every_loss(*settings):
  """Returns (mesh shape, fields) of every loss in every setting.

  `make test` takes each loss and each setting once, `make test-slow` the rest.

  Args:
    *settings: mesh shapes and fields.
  """
  return [
    pytest.param(
      mesh_shape,
      dict(name=name, **fields),
      marks=() if i == j % len(settings) else pytest.mark.slow,
    )
    for i, (mesh_shape, fields) in enumerate(settings)
    for j, name in enumerate(config_lib.LOSSES)
  ]


@pytest.mark.parametrize(
  ('mesh_shape', 'fields'),
  [
    *every_loss(((8, 1), {}), ((4, 2), {}), ((2, 4), {}), ((1, 8), {})),
    ((1, 1), dict(name='mlcd', margin_type='arcface')),
    ((2, 1), dict(name='mlcd', interclass_filter=0.5)),
  ],
)
def test_all_classes(mesh_shape, fields):
  check_against_reference(
    1_500,  # Not divisible by the blocks, nor by the devices.
    loss_config(sample_rate=1.0, **fields),
    make_mesh(*mesh_shape),
    positives=1 if fields['name'] == 'softmax' else POSITIVES,
  )


@pytest.mark.parametrize(
  ('mesh_shape', 'fields'),
  [
    *every_loss(
      ((8, 1), dict(sample_rate=0.1, negatives='uniform')),
      ((4, 2), dict(sample_rate=0.05, negatives='partial_fc')),
      ((2, 4), dict(sample_rate=0.3, negatives='uniform')),
      ((1, 8), dict(sample_rate=0.5, negatives='partial_fc')),
    ),
    ((1, 1), dict(name='sigmoid', sample_rate=0.01)),
    ((1, 2), dict(name='mlcd', sample_rate=1e-9, interclass_filter=0.4)),
    ((1, 4), dict(name='mean_softmax', sample_rate=0.2, margin_type='arcface')),
  ],
)
def test_sampled_classes(mesh_shape, fields):
  check_against_reference(
    2_100,
    loss_config(**fields),
    make_mesh(*mesh_shape),
    positives=1 if fields['name'] == 'softmax' else POSITIVES,
  )


@pytest.mark.parametrize('negatives', sampling.MODES)
def test_the_same_on_every_mesh(negatives):
  num_classes = 1_500
  problem = make_problem(num_classes)
  config = loss_config(sample_rate=0.1, negatives=negatives)
  expected = run(*problem, num_classes, config, make_mesh(1, 1))
  for shape in ((2, 4),):
    found = run(*problem, num_classes, config, make_mesh(*shape))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(found[1], expected[1]):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    # The very same classes take part.
    np.testing.assert_array_equal(
      np.any(found[1][0] != 0, axis=1), np.any(expected[1][0] != 0, axis=1)
    )


@pytest.mark.parametrize(
  ('shape', 'negatives'),
  [((3, 2), 'partial_fc'), ((1, 5), 'uniform')],
)
def test_the_same_on_devices_that_do_not_divide_the_blocks(shape, negatives):
  num_classes, devices = 1_500, shape[0] * shape[1]
  weight, embeddings, labels = make_problem(num_classes)
  embeddings, labels = np.tile(embeddings, (2, 1)), np.tile(labels, (2, 1))
  rows = devices * (len(labels) // devices)
  problem = embeddings[:rows], labels[:rows]
  config = loss_config(sample_rate=0.1, negatives=negatives)
  expected = run(weight, *problem, num_classes, config, make_mesh(1, 1))
  padded = np.pad(
    weight,
    (
      (0, sampling.Layout(num_classes).rows_over(devices) - len(weight)),
      (0, 0),
    ),
  )
  assert len(padded) > len(weight)
  found = run(padded, *problem, num_classes, config, make_mesh(*shape))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  assert not found[1][0][len(weight) :].any()
  for a, b in zip(found[1], expected[1]):
    a = a[: len(b)]
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    np.testing.assert_array_equal(a.any(axis=1), b.any(axis=1))


@pytest.mark.parametrize('negatives', sampling.MODES)
def test_classes_that_pile_up_on_a_device_are_all_kept(negatives):
  # All positives lie on the first of 8 devices.
  num_classes = 4_096
  layout = sampling.Layout(num_classes)
  weight, embeddings, labels = make_problem(num_classes)
  labels = layout.class_of(jnp.arange(BATCH * POSITIVES))
  labels = np.asarray(labels).reshape(BATCH, -1)
  config = loss_config(sample_rate=0.01, negatives=negatives)
  problem = weight, embeddings, labels
  expected = run(*problem, num_classes, config, make_mesh(1, 1))
  found = run(*problem, num_classes, config, make_mesh(8, 1))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for a, b in zip(found[1], expected[1]):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  drawn = draw(num_classes, config, labels, jax.random.key(3))
  if negatives == 'partial_fc':
    assert set(labels.flat) <= set(drawn.tolist())


@pytest.mark.parametrize(
  'fields', [dict(), dict(negatives='partial_fc'), dict(name='mean_softmax')]
)
def test_chunks_equal_the_whole(fields):
  num_classes = 1_500
  problem = make_problem(num_classes)
  config = loss_config(sample_rate=0.2, **fields)
  mesh = make_mesh(2, 2)
  whole = run(*problem, num_classes, config, mesh)
  # Room for 5 rows of this device's share of the logits, or fewer.
  config.chunk_megabytes = 4 * 512 * 5 / 2**20
  chunked = run(*problem, num_classes, config, mesh)
  np.testing.assert_allclose(chunked[0], whole[0], rtol=1e-5)
  for a, b in zip(chunked[1], whole[1]):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def compile_step(num_classes, batch, dim, mesh, config, dtype=jnp.bfloat16):
  """The loss and its gradients, compiled from shapes alone."""
  shard = lambda spec: jax.sharding.NamedSharding(mesh, spec)  # noqa: E731
  weight = jax.ShapeDtypeStruct(
    (sampling.Layout(num_classes).rows, dim),
    jnp.float32,
    sharding=shard(sharding.CLASSES),
  )
  embeddings = jax.ShapeDtypeStruct(
    (batch, dim), jnp.float32, sharding=shard(sharding.BATCH)
  )
  labels = jax.ShapeDtypeStruct(
    (batch, 8), jnp.int32, sharding=shard(sharding.BATCH)
  )

  def f(weight, embeddings, labels):
    loss_B = classifier.loss(
      weight,
      embeddings,
      labels,
      num_classes=num_classes,
      config=config,
      dtype=dtype,
      key=jax.random.key(0),
      mesh=mesh,
    )
    return jnp.mean(loss_B)

  step = jax.jit(
    jax.grad(f, argnums=(0, 1)),
    out_shardings=(shard(sharding.CLASSES), shard(sharding.BATCH)),
    compiler_options=_QUICK,
  )
  return step.lower(weight, embeddings, labels).compile()


@pytest.mark.parametrize(
  'fields',
  [
    dict(sample_rate=1.0),
    dict(sample_rate=0.1),
    dict(sample_rate=0.1, negatives='partial_fc', name='mean_softmax'),
  ],
)
def test_weights_never_travel(fields):
  num_classes, batch, dim = 50_000, 64, 16
  compiled = compile_step(
    num_classes, batch, dim, make_mesh(4, 2), loss_config(**fields)
  )
  collectives = re.findall(
    r'= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute)(?:-start)?\((.*?)\)',
    compiled.as_text(),
  )
  assert collectives
  largest = 0
  for shapes in collectives:
    for dims in re.findall(r'\w+\[([\d,]*)\]', ' '.join(shapes)):
      size = int(np.prod([int(d) for d in dims.split(',') if d]))
      largest = max(largest, size)
  # Embeddings are the largest; the weight is 800 times and even a device's
  # share of it 100 times as large.
  assert largest == batch * dim


def test_memory_grows_with_the_chunk_not_with_the_logits():
  num_classes, batch, dim = 1_000_000, 8_192, 8

  def temporaries(chunk_megabytes, batch=batch):
    config = loss_config(sample_rate=1.0, chunk_megabytes=chunk_megabytes)
    compiled = compile_step(num_classes, batch, dim, make_mesh(1, 1), config)
    return compiled.memory_analysis().temp_size_in_bytes / 2**20

  logits = 4 * batch * num_classes / 2**20
  small, large = temporaries(128), temporaries(1_024)
  assert small < large < logits / 4
  # A few arrays of the chunk's size.
  assert (large - small) / (1_024 - 128) < 6
  # Half the images take as much.
  assert temporaries(128, batch // 2) > 0.8 * small


def test_bytes_do_not_grow_with_classes_at_a_fixed_number_a_device():
  config = loss_config(sample_rate=0.1)

  def needed(devices, batch=64):
    mesh = make_mesh(devices, 1)
    compiled = compile_step(devices * 16_384, batch, 16, mesh, config)
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes

  assert needed(8) < 1.05 * needed(2)
