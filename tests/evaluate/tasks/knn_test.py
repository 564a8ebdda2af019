"""kNN against brute force."""

import numpy as np

from mlcd_jax.evaluate.tasks import knn
from tests.evaluate import blobs


def test_equals_brute_force():
  rng = np.random.default_rng(0)
  train, test = rng.normal(size=(150, 8)), rng.normal(size=(70, 8))
  train_labels = rng.integers(0, 5, 150)
  test_labels = rng.integers(0, 5, 70)
  found = blobs.run(
    knn,
    (train.astype(np.float32), train_labels),
    (test.astype(np.float32), test_labels),
    5,
  )

  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  cosines = unit(test) @ unit(train).T
  for k, name in ((10, 'accuracy'), (20, 'accuracy_k20')):
    right = 0
    for row, label in zip(cosines, test_labels):
      nearest = np.argsort(-row)[:k]
      votes = np.bincount(
        train_labels[nearest], np.exp(row[nearest] / 0.07), minlength=5
      )
      right += votes.argmax() == label
    assert found[name] == right / 70
  assert 'accuracy_k100' in found
  assert 'accuracy_k200' not in found  # More than there are.
