"""What each of two processes, interleaved in the mesh, checks for a test.

python -m tests.two_processes CHECK PORT INDEX FOLDER
"""

import os
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import manifests
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.data import pipelines
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import lit
from mlcd_jax.models import text
from mlcd_jax.runtime import distributed
from mlcd_jax.runtime import errors
from mlcd_jax.weights import checkpoint
from tests.data import shards

_SIZE = 32


class _Grey:
  """Images whose brightness is 20 times the record, which is the label too."""

  def __init__(self, count, bad=()):
    self._count = count
    self._bad = bad

  def __len__(self):
    return self._count

  def keys(self):
    return np.array([b'%03d' % i for i in range(self._count)])

  def __getitem__(self, i):
    image = shards.encode(np.full((_SIZE, _SIZE, 3), 20 * i, np.uint8), 'PNG')
    if i in self._bad:
      image = b'no image'
    return {'key': f'{i:03}', 'image': image, 'label': i, 'caption': ''}


def _brightness(images):
  return images.astype(np.float32).mean(axis=(1, 2, 3))[:, None] / 255


class _Brightness:
  """A model; compiled programs are kept by it, so it has a hash."""

  image_size = _SIZE

  def apply(self, variables, images):
    del variables
    return {'pooled': _brightness(images)}


def _encoders(mesh):
  embedder = types.SimpleNamespace(image_size=_SIZE, prepare=None)
  return {
    'model': encoders.from_model(_Brightness(), {}, mesh),
    'embedder': encoders.from_embedder(_Callable(_brightness, embedder)),
    'raw': encoders.raw_pixels(),
  }


class _Callable:
  def __init__(self, call, attributes):
    vars(self).update(vars(attributes))
    self._call = call

  def __call__(self, images):
    return self._call(images)


def order(folder):
  """Rows of every stage are beside their own labels, and in order."""
  del folder
  source = _Grey(11, bad=(3, 6))
  good = [i for i in range(11) if i not in (3, 6)]
  for name, encoder in _encoders(sharding.make_mesh()).items():
    split = features.Extractor(encoder, name, 8)(source, 'test')
    assert split.labels.tolist() == good, (name, split.labels)
    assert split.records.tolist() == good, (name, split.records)
    shown = 255 / 20 * split.features.mean(axis=1)
    np.testing.assert_allclose(shown, good, atol=1e-3, err_msg=name)


def batches(folder):
  """A global batch is the one that a single process makes."""
  del folder
  mesh = sharding.make_mesh()
  source = _Grey(11, bad=(3,))

  def first(**rows):
    return next(
      pipelines.train_batches(
        source,
        np.arange(11),
        np.arange(11, dtype=np.int32)[:, None],
        num_positives=1,
        batch_size=8,
        image_size=16,
        crop_area=(0.5, 1.0),
        flip=True,
        seed=1,
        **rows,
      )
    )

  whole = first()
  own = first(rows=sharding.own_rows(mesh, 8))
  for name, rows in sharding.put_batch(mesh, own).items():
    np.testing.assert_array_equal(sharding.to_host(rows), whole[name], name)


def views(folder):
  """Process 1 does not see what process 0 sees, and does the same."""
  made = manifests.open_for('embed', folder, config={'a': [1]}, inputs={})
  made.notes['mean'] = distributed.is_main()
  made.finish(rows=3)
  assert made.notes == {'mean': True}
  (folder / 'bad_keys.txt').write_text('')
  calls = []
  encoder = encoders.raw_pixels()
  encode = encoder.encode
  object.__setattr__(encoder, 'encode', lambda x: calls.append(0) or encode(x))
  extract = features.Extractor(encoder, 'x', 8, folder)
  before = extract(_Grey(11), 'test')
  assert len(calls) == 2
  if not distributed.is_main():
    pathlib.Path.exists = lambda *_: False
  again = extract(_Grey(11), 'test')
  assert len(calls) == 3
  np.testing.assert_array_equal(before.features, again.features)
  found = manifests.open_for('embed', folder, config={'a': [1]}, inputs={})
  assert found.complete and found.fingerprint() == made.fingerprint()
  config = stages._with_bad_keys(config_lib.default(), folder)
  assert config.data.bad_keys
  large = {'a': 'b' * 3_000_000, 'c': [None, 1.5]}
  assert distributed.decide('large', lambda: large) == large
  if distributed.is_main():
    sources.check_same(_Grey(11), 'data.path')
  else:
    with pytest.raises(errors.RunError, match='data.path: not the same on '):
      sources.check_same(_Grey(10), 'data.path')


def checkpoints(folder):
  """All skip a checkpoint that process 0 finds damaged."""
  mesh = sharding.make_mesh()
  folder = folder / 'checkpoints'
  state = {'x': sharding.put(mesh, sharding.BATCH, np.arange(8.0))}
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )
  checkpointer = checkpoint.Checkpointer(folder, keep=3)
  checkpointer.save(1, state)
  checkpointer.save(2, state)
  checkpointer.close()
  if distributed.is_main():
    files = [p for p in (folder / '2/default').rglob('*') if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b'?')
  distributed.barrier('damaged')
  checkpointer = checkpoint.Checkpointer(folder, keep=3)
  found, step = checkpointer.restore_latest(abstract)
  checkpointer.close()
  assert step == 1
  np.testing.assert_array_equal(sharding.to_host(found['x']), np.arange(8.0))
  distributed.barrier('set aside')  # By process 0.
  assert os.path.exists(folder / 'damaged/2')


def tuning(folder):
  """A text tower is tuned, 20 times."""
  del folder
  config = config_lib.default()
  config.lit.batch_size, config.lit.steps = 16, 3
  config.optimizer.warmup_steps = 1
  rng = np.random.default_rng(0)
  images = rng.normal(size=(32, 8)).astype(np.float32)
  images /= np.linalg.norm(images, axis=1, keepdims=True)
  model = text.TextTower(
    vocab_size=64, context=8, width=16, depth=1, heads=1, mlp_dim=16,
    embedding_dim=8, dtype=jnp.float32,
  )  # fmt: skip

  def words(texts):
    return np.array([[1, len(t) % 64, 63] + [0] * 5 for t in texts], np.int32)

  told = [['x' * i] for i in range(32)]
  found = []
  for _ in range(20):
    params = lit.train(
      model, words, images, told, config=config, mesh=sharding.make_mesh()
    )
    found.append(jax.tree.map(sharding.to_host, params))
  for other in found[1:]:
    jax.tree.map(np.testing.assert_array_equal, found[0], other)


if __name__ == '__main__':
  check, port, index, folder = sys.argv[1:]
  distributed.initialize(
    coordinator_address=f'127.0.0.1:{port}',
    num_processes=2,
    process_id=int(index),
  )
  processes = [d.process_index for d in sharding.make_mesh().devices.flat]
  assert processes == [0, 1] * (len(processes) // 2)
  for name in check.split(','):
    globals()[name](pathlib.Path(folder))
    print(name)
  distributed.shutdown()
