"""The linear probe against scikit-learn's, over the same penalties.

  python benchmarks/linear_probe.py

10,000 x 768 features with a decaying spectrum, 100 classes, two cores. Both
fit CLIP's first seven penalties and, one after the other, those around the
best, to convergence: ours as it does, in float32; scikit-learn's L-BFGS in
float64 to a tolerance at which the objectives are equal, each from the model
before. The rounds take turns. Also shown: accuracy on other rows, and by how
much our objective is above theirs, relatively.
"""

import argparse
import pathlib
import sys
import time
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import openblas  # noqa: E402

openblas.set_core_type()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from sklearn import exceptions  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from mlcd_jax import sharding  # noqa: E402
from mlcd_jax.evaluate import logistic  # noqa: E402

_TOLERANCE = 1e-7


def draw(num_rows, dim, num_classes, num_test, seed=0):
  """Rows around class means, with variances falling as 1 / i, off center."""
  rng = np.random.default_rng(seed)
  spectrum = 3 * np.arange(1, dim + 1) ** -0.5
  turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
  means = 0.25 * rng.normal(size=(num_classes, dim)) * spectrum
  y = rng.integers(0, num_classes, num_rows + num_test)
  x = means[y] + rng.normal(size=(len(y), dim)) * spectrum
  x = (x @ turn + 0.5 * rng.normal(size=dim)).astype(np.float32)
  return x[:num_rows], y[:num_rows], x[num_rows:], y[num_rows:]


def objective(weight, bias, x, y, penalty):
  """Mean loss plus penalty / 2 times the squared weights, in float64."""
  z = x.astype(np.float64) @ weight + bias
  z -= z.max(1, keepdims=True)
  loss = np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]
  return loss.mean() + penalty / 2 * np.square(weight).sum()


def ours(x, y, batches, num_classes):
  """Weights and biases of every penalty, from the strongest on."""
  rows = logistic.prepare(x, sharding.make_mesh(), num_outputs=num_classes)
  found, model = [], None
  for exponent in _exponents(batches):
    model = logistic.fit(rows, y, np.ones(len(x)), 10.0**exponent, start=model)
    found.append((model.weight_DC, model.bias_C))
  return found


def theirs(x, y, batches, num_classes):
  """Fits the same models as `ours`, by scikit-learn."""
  del num_classes
  found = []
  model = LogisticRegression(max_iter=10_000, tol=_TOLERANCE, warm_start=True)
  for exponent in _exponents(batches):
    model.set_params(C=10.0**-exponent).fit(x.astype(np.float64), y)
    found.append((model.coef_.T, model.intercept_))
  return found


def _exponents(batches):
  return [e for batch in batches for e in sorted(batch, reverse=True)]


def main():
  """Prints times, their ratios, accuracies and objectives."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--rows', type=int, default=10_000)
  parser.add_argument('--dim', type=int, default=768)
  parser.add_argument('--classes', type=int, default=100)
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument(
    '--refinements', type=int, default=4, help='of two penalties each'
  )
  args = parser.parse_args()
  warnings.filterwarnings('ignore', category=exceptions.ConvergenceWarning)
  x, y, test_x, test_y = draw(args.rows, args.dim, args.classes, 2_000)
  batches = [np.arange(-6, 7, 2)]
  step = 2.0
  for _ in range(args.refinements):
    step /= 2
    batches.append((-step, step))
  compiled = time.perf_counter()
  ours(x, y, batches[:2], args.classes)
  print(
    f'first call, compiling included: {time.perf_counter() - compiled:.1f} s'
  )
  seconds, objectives = {ours: [], theirs: []}, {}
  for _ in range(args.rounds):
    for fit in seconds:
      begun = time.perf_counter()
      found = fit(x, y, batches, args.classes)
      seconds[fit].append(time.perf_counter() - begun)
      accuracy = [
        np.mean((test_x @ w + b).argmax(1) == test_y) for w, b in found
      ]
      penalties = 10.0 ** np.array(_exponents(batches)) / len(x)
      values = [objective(w, b, x, y, p) for (w, b), p in zip(found, penalties)]
      print(f'{fit.__name__}: {seconds[fit][-1]:.1f} s, best accuracy '
            f'{max(accuracy):.4f}')  # fmt: skip
      print('  accuracy ', ' '.join(f'{a:.3f}' for a in accuracy))
      objectives[fit] = np.array(values)
      print('  objective', ' '.join(f'{v:.4g}' for v in values))
    above = objectives[ours] / objectives[theirs] - 1
    print('  above', ' '.join(f'{v:.0e}' for v in above))
  ratio = [b / a for a, b in zip(seconds[ours], seconds[theirs])]
  print(
    f'{np.median(ratio):.1f} times faster on {jax.device_count()} device(s)'
  )


if __name__ == '__main__':
  main()
