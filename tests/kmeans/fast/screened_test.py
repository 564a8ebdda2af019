"""Passes that look only where labels can change, against plain ones."""

import jax
import numpy as np
import pytest

from mlcd_jax import activity
from mlcd_jax import candidates
from mlcd_jax import kmeans
from mlcd_jax import points
from mlcd_jax import screening
from mlcd_jax import sharding
from mlcd_jax import widths
from tests import fits


def make_groups(num_rows, dim, num_groups, *, noise, seed=0):
  """Rows around group means, with a spectrum that falls."""
  rng = np.random.default_rng(seed)
  spectrum = np.arange(1, dim + 1) ** -0.7
  groups = rng.normal(size=(num_groups, dim)) * spectrum
  rows = groups[rng.integers(0, num_groups, num_rows)]
  rows += noise * rng.normal(size=rows.shape) * spectrum
  return rows.astype(np.float32)


TIGHT = make_groups(2_600, 256, 600, noise=0.4)
LOOSE = make_groups(2_600, 256, 600, noise=1.5)


def spied_sizes(monkeypatch):
  """How many centers each pass looks at, 0 for a plain one."""
  sizes = []
  choose = activity.Activity._choose_size

  def spy(self):
    sizes.append(choose(self))
    return sizes[-1]

  monkeypatch.setattr(activity.Activity, '_choose_size', spy)
  return sizes


def quick_passes(saved):
  return [
    i + 1
    for i, state in enumerate(saved[:-1])
    if np.isfinite(state.known['drift']).all()
  ]


@pytest.mark.parametrize('shape', [(1, 1), (4, 2)])
def test_unscreened_is_a_plain_pass_in_every_bit(monkeypatch, shape):
  x = make_groups(3_000, 16, 300, noise=0.3)
  x[7] = np.nan
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  sizes = spied_sizes(monkeypatch)
  found = kmeans.fit(x, 700, iterations=10, mesh=mesh)
  assert sum(size > 0 for size in sizes) >= 5
  assert min(size for size in sizes if size) < max(sizes)
  monkeypatch.setattr(activity.Activity, '_choose_size', lambda self: 0)
  fits.assert_same(found, kmeans.fit(x, 700, iterations=10, mesh=mesh))


def test_ties_stay_with_the_lower_index_when_centers_move(monkeypatch):
  # Rows come in equal pairs, so that centers coincide while others move.
  x = np.repeat(make_groups(600, 16, 100, noise=0.5), 2, axis=0)
  sizes = spied_sizes(monkeypatch)
  options = dict(iterations=8, init=np.arange(800))
  found = kmeans.fit(x, 800, **options)
  assert any(sizes)
  monkeypatch.setattr(activity.Activity, '_choose_size', lambda self: 0)
  fits.assert_same(found, kmeans.fit(x, 800, **options))


def test_screened_labels_are_nearly_the_best():
  saved = []
  fit = kmeans.fit(TIGHT, 520, iterations=6, save=saved.append)
  assert 'ids_nC' in fit.known
  assert len(quick_passes(saved)) >= 2
  centers = saved[-2].centers  # Those that the last labels were found with.
  x = points.unit_rows(TIGHT)
  own = np.sum(x * centers[fit.known['label_n']], axis=1)
  _, best = kmeans.nearest_centers(TIGHT, centers, 1)
  assert np.mean(best[:, 0] - own) < 1e-4 * fit.objective[-1]
  plain = kmeans.fit(TIGHT, 520, iterations=6, screening='off')
  assert 'ids_nC' not in plain.known
  assert fit.objective[-1] == pytest.approx(plain.objective[-1], rel=2e-3)


def test_quick_passes_keep_the_sums_of_the_labels():
  x = TIGHT.copy()
  x[0], x[9] = 0, np.nan
  saved = []
  kmeans.fit(x, 520, iterations=6, save=saved.append)
  unit = points.unit_rows(x)
  usable = unit.any(axis=1)
  quick = quick_passes(saved)
  assert quick
  for state in (saved[i] for i in quick):
    labels = state.known['label_n']
    assert labels.max() < 520
    counts = np.bincount(labels[usable], minlength=520)
    np.testing.assert_array_equal(state.counts, counts)
    sums = np.zeros((520, unit.shape[1]))
    np.add.at(sums, labels[usable], unit[usable])
    sums /= np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(state.centers, sums, atol=1e-5)
  before, after = (saved[quick[0] - i].known['label_n'] for i in (1, 0))
  assert 0 < np.sum(before != after) < 1_000


def test_all_dimensions_are_scored_where_fewer_cost_too_much(monkeypatch):
  monkeypatch.setattr(widths, '_screened_loss', lambda *args: 1e-3)
  fit = kmeans.fit(TIGHT, 520, iterations=1)
  assert fit.known['width'] == 0
  first = kmeans.fit(TIGHT, 520, iterations=0)
  best, _ = kmeans.nearest_centers(TIGHT, first.centers, 1)
  np.testing.assert_array_equal(fit.known['label_n'], best[:, 0])


def wrong_labels(x, saved):
  """How many of a finished clustering's labels are not the best centers."""
  best, _ = kmeans.nearest_centers(x, saved[-2].centers, 1)
  return np.sum(saved[-1].known['label_n'] != best[:, 0])


def test_old_candidates_are_sought_anew(monkeypatch):
  monkeypatch.setattr(widths.Sample, 'choose', lambda self, *args: 0)
  wrong = []
  for rise in (0.0, 10.0):
    age = (rise, 0.0)
    monkeypatch.setattr(widths.Sample, 'age', lambda *_, a=age, **__: a)
    saved = []
    kmeans.fit(LOOSE, 520, iterations=5, save=saved.append)
    assert len(quick_passes(saved)) == 4
    wrong.append(wrong_labels(LOOSE, saved))
  assert wrong[0] > 0 and wrong[1] == 0


def test_a_pass_that_cost_too_much_lengthens_the_reach(monkeypatch):
  monkeypatch.setattr(widths.Sample, 'age', lambda *_, **__: (0.0, 0.0))
  monkeypatch.setattr(widths, '_WORTH', 0.0)
  wrong = []
  for limit in (1.0, 0.0):
    monkeypatch.setattr(widths, '_MAX_PASS_LOSS', limit)
    saved = []
    kmeans.fit(LOOSE, 520, iterations=5, save=saved.append)
    reach = [float(state.known['reach']) for state in saved]
    assert (reach[-1] > 0) == (limit == 0)
    assert reach == sorted(reach)
    wrong.append(wrong_labels(LOOSE, saved))
  assert wrong[1] < wrong[0] / 2


def test_searches_fully_where_most_candidates_are_old(monkeypatch):
  monkeypatch.setattr(widths.Sample, 'age', lambda *_, **__: (10.0, 0.6))
  saved = []
  kmeans.fit(LOOSE, 520, iterations=3, save=saved.append)
  assert not quick_passes(saved)
  monkeypatch.setattr(screening, '_MOST_OLD', 0.7)
  kmeans.fit(LOOSE, 520, iterations=3, save=saved.append)
  assert quick_passes(saved[3:]) == [1, 2]


def test_goes_on_screened_with_the_same_bits():
  saved = []
  whole = kmeans.fit(TIGHT, 520, iterations=6, save=saved.append)
  for state in saved[0], saved[2]:
    assert 'ids_nC' in state.known
    fits.assert_same(kmeans.fit(TIGHT, 520, iterations=6, resume=state), whole)


@pytest.mark.parametrize('screening_', ['off', 'auto'])
def test_goes_on_on_another_mesh_without_losing_rows(screening_):
  def mesh(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return sharding.make_mesh(*shape, devices=devices)

  saved = []
  options = dict(iterations=4, screening=screening_)
  whole = kmeans.fit(TIGHT, 520, mesh=mesh(1, 1), save=saved.append, **options)
  for state in saved[:3]:
    found = kmeans.fit(TIGHT, 520, mesh=mesh(4, 2), resume=state, **options)
    assert found.counts.sum() == len(TIGHT)
    np.testing.assert_allclose(found.objective, whole.objective, rtol=1e-4)


@pytest.mark.parametrize('num_centers', [3_072, 5_120, 131 * 1_024])
def test_the_best_center_is_among_the_candidates(num_centers):
  rng = np.random.default_rng(0)
  c, x = (
    rng.normal(size=(rows, 8)).astype(np.float32) for rows in (num_centers, 64)
  )
  ids = np.asarray(jax.jit(candidates.seek, static_argnums=2)(c, x, len(c)))
  assert ids.shape == (64, candidates.COUNT)
  best = (x @ c.T).argmax(axis=1)
  assert (ids == best[:, None]).any(axis=1).all()


def test_screened_read_anew_or_held_gives_the_same_bits(monkeypatch):
  monkeypatch.setattr(points, '_CPU_CHUNK', 1_024)
  mesh = sharding.make_mesh(2, 1, devices=jax.devices()[:2])
  held = kmeans.fit(TIGHT, 520, iterations=4, mesh=mesh)
  assert 'ids_nC' in held.known
  monkeypatch.setattr(points, '_CPU_HELD_BYTES', 0)
  fits.assert_same(kmeans.fit(TIGHT, 520, iterations=4, mesh=mesh), held)


@pytest.mark.parametrize('screening_, rtol', [('off', 1e-6), ('auto', 1e-4)])
def test_meshes_agree(screening_, rtol):
  # Screened, the last bits of centers choose among equally good dimensions.
  one, four = (
    kmeans.fit(
      TIGHT,
      520,
      iterations=3,
      screening=screening_,
      mesh=sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)]),
    )
    for shape in ((1, 1), (2, 2))
  )
  assert ('ids_nC' in one.known) == (screening_ == 'auto')
  assert one.known.keys() == four.known.keys()
  np.testing.assert_allclose(one.objective, four.objective, rtol=rtol)
