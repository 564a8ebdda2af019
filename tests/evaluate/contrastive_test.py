"""Contrastive losses: every mesh and chunk equals the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import sharding
from mlcd_jax.evaluate import contrastive

MESHES = ((1, 1), (8, 1), (2, 4), (1, 8), (4, 2))
B, D = 24, 5


def dense(name, images, texts, scale, bias):
  """The papers' formulas on the whole matrix."""
  logits = scale * images @ texts.T + bias
  if name == 'softmax':
    rows = jnp.diag(jax.nn.log_softmax(logits, axis=1))
    columns = jnp.diag(jax.nn.log_softmax(logits, axis=0))
    return -(rows + columns).mean() / 2
  signs = 2 * jnp.eye(len(images)) - 1
  return -jax.nn.log_sigmoid(signs * logits).sum() / len(images)


def arguments(batch=B):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(2, batch, D)).astype(np.float32)
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  return rows[0], rows[1], np.float32(9.0), np.float32(-3.0)


def mesh_of(data, fsdp):
  devices = jax.devices()[: data * fsdp]
  return sharding.make_mesh(data, fsdp, devices=devices)


# 7 leaves a rest. With one mesh of two axes all sizes; with the others the
# rest is slow.
_CASES = [
  pytest.param(
    mesh,
    chunks,
    marks=pytest.mark.slow if mesh != (2, 4) and chunks != (7,) else (),
  )
  for mesh in MESHES
  for chunks in ((7,), (8, 1_024))
]


@pytest.mark.parametrize(('mesh', 'chunks'), _CASES)
@pytest.mark.parametrize('name', contrastive.LOSSES)
def test_loss_and_gradients_equal_the_dense_ones(name, mesh, chunks):
  for chunk in chunks:
    loss = contrastive.make(name, mesh_of(*mesh), chunk=chunk)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(
      *arguments()
    )
    expected = jax.value_and_grad(
      lambda *a: dense(name, *a), argnums=(0, 1, 2, 3)
    )(*arguments())
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      found,
      expected,
    )


@pytest.mark.parametrize('name', contrastive.LOSSES)
def test_no_device_holds_more_than_a_chunk_of_logits(name):
  """In the compiled program, whose arrays are one device's."""
  batch, chunk = 512, 32
  loss = contrastive.make(name, mesh_of(8, 1), chunk=chunk)
  text = (
    jax.jit(jax.grad(loss, argnums=1))
    .lower(*arguments(batch))
    .compile()
    .as_text()
  )
  own = batch // 8
  assert f'f32[{own},{chunk}]' in text
  assert f'[{own},{batch}]' not in text and f'[{batch},{own}]' not in text
  assert f'[{batch},{batch}]' not in text


@pytest.mark.parametrize('name', contrastive.LOSSES)
def test_images_and_texts_are_gathered_in_one_collective(name):
  loss = contrastive.make(name, mesh_of(8, 1))
  text = str(jax.make_jaxpr(loss)(*arguments()))
  assert text.count('all_gather[') == 1
