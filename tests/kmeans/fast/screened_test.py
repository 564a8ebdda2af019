"""Screened passes against exact ones, on CPUs."""

import jax
import numpy as np
import pytest

from mlcd_jax import kmeans
from mlcd_jax import sharding
from mlcd_jax import unit
from mlcd_jax.kmeans.fast import candidates
from mlcd_jax.kmeans.fast import dimensions
from mlcd_jax.kmeans.fast import screened
from tests.kmeans import fits


def make_groups(num_rows, dim, num_groups, *, noise, seed=0):
  """Rows around group means, with a spectrum that falls."""
  rng = np.random.default_rng(seed)
  spectrum = np.arange(1, dim + 1) ** -0.7
  groups = rng.normal(size=(num_groups, dim)) * spectrum
  rows = groups[rng.integers(0, num_groups, num_rows)]
  rows += noise * rng.normal(size=rows.shape) * spectrum
  return rows.astype(np.float32)


SLOW_AUTO = pytest.param('auto', marks=pytest.mark.slow)

TIGHT = make_groups(2_600, 256, 600, noise=0.4)
LOOSE = make_groups(2_600, 256, 600, noise=1.5)


def limited(**limits):
  """Makes assigners with these limits."""

  def make(chunks, num_centers):
    return screened.Screened(
      chunks,
      chunks.sample(),
      num_centers,
      limits=dimensions.Limits(**limits),
    )

  return make


def quick_passes(saved):
  """Numbers of the passes that started from the sums of the one before."""
  return [
    i + 1
    for i, state in enumerate(saved[:-1])
    if 'sums' in state.assigner_state
  ]


def labels_of(state):
  return state.assigner_state['label_n']


def make_mesh(*shape):
  return sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


def test_labels_are_nearly_the_best():
  saved = list(kmeans.iterate(TIGHT, 520, iterations=6))
  fit = saved[-1]
  assert fit.assigner == 'screened'
  assert len(quick_passes(saved)) >= 2
  centers = saved[-2].centers  # Those that the last labels were found with.
  x = unit.unit_rows(TIGHT)
  own = np.sum(x * centers[labels_of(fit)], axis=1)
  _, best = kmeans.nearest_centers(TIGHT, centers, 1)
  assert np.mean(best[:, 0] - own) < 1e-4 * fit.objective[-1]
  plain = kmeans.fit(TIGHT, 520, iterations=6, method='exact')
  assert plain.assigner == 'plain'
  assert fit.objective[-1] == pytest.approx(plain.objective[-1], rel=2e-3)


@pytest.mark.parametrize(
  'rows, dim, centers, pays',
  [
    (2_048, 256, 512, True),
    (2_047, 256, 512, False),
    (2_048, 255, 512, False),
    (2_048, 256, 511, False),
    (44_000_000, 768, 10_000, True),
    (45_000_000, 768, 10_000, False),
  ],
)
def test_large_clusterings_alone_are_screened(rows, dim, centers, pays):
  assert screened.pays(rows, dim, centers) == pays


def test_quick_passes_keep_the_sums_of_the_labels():
  x = TIGHT.copy()
  x[0], x[9] = 0, np.nan
  saved = list(kmeans.iterate(x, 520, iterations=6))
  unit_rows = unit.unit_rows(x)
  usable = unit_rows.any(axis=1)
  quick = quick_passes(saved)
  assert quick
  for state in (saved[i] for i in quick):
    labels = labels_of(state)
    assert labels.max() < 520
    counts = np.bincount(labels[usable], minlength=520)
    np.testing.assert_array_equal(state.counts, counts)
    sums = np.zeros((520, x.shape[1]))
    np.add.at(sums, labels[usable], unit_rows[usable])
    sums /= np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(state.centers, sums, atol=1e-5)
  before, after = (labels_of(saved[quick[0] - i]) for i in (1, 0))
  assert 0 < np.sum(before != after) < 1_000


def test_all_dimensions_are_scored_where_fewer_lose_too_much():
  fit = fits.states(
    TIGHT, 520, iterations=1, assigner=limited(width_loss=1e-12)
  )[-1]
  assert fit.assigner_state['width'] == 0
  first = kmeans.fit(TIGHT, 520, iterations=0)
  best, _ = kmeans.nearest_centers(TIGHT, first.centers, 1)
  np.testing.assert_array_equal(labels_of(fit), best[:, 0])


def wrong_labels(x, saved):
  """How many of the last labels are not the best centers."""
  best, _ = kmeans.nearest_centers(x, saved[-2].centers, 1)
  return np.sum(labels_of(saved[-1]) != best[:, 0])


@pytest.mark.slow
def test_rows_with_stale_candidates_are_searched_again():
  # So that all dimensions are scored, and no check repairs what is missed.
  options = dict(width_loss=1e-12, pass_loss=1.0, stale_share=1.0)
  wrong = []
  for deviations in (-1_000.0, 1_000.0):
    saved = fits.states(
      LOOSE,
      520,
      iterations=5,
      assigner=limited(rise_deviations=(deviations, deviations), **options),
    )
    assert len(quick_passes(saved)) == 4
    wrong.append(wrong_labels(LOOSE, saved))
  assert wrong[0] > 0 and wrong[1] == 0


@pytest.mark.slow
def test_a_pass_that_lost_too_much_lengthens_the_reach():
  wrong = []
  for limit in (1.0, 0.0):
    saved = fits.states(
      LOOSE,
      520,
      iterations=5,
      assigner=limited(
        rise_deviations=(-1_000, -1_000),
        pass_loss=limit,
        full_search_worth=0.0,
      ),
    )
    reach = [float(state.assigner_state['reach']) for state in saved]
    assert (reach[-1] > 0) == (limit == 0)
    assert reach == sorted(reach)
    wrong.append(wrong_labels(LOOSE, saved))
  assert wrong[1] < wrong[0] / 2


@pytest.mark.parametrize('share, quick', [(0.5, []), (1.0, [1, 2])])
def test_searches_fully_where_most_candidates_are_stale(share, quick):
  saved = fits.states(
    LOOSE,
    520,
    iterations=3,
    assigner=limited(rise_deviations=(1_000, 1_000), stale_share=share),
  )
  assert quick_passes(saved) == quick


def test_goes_on_with_the_same_bits():
  saved = list(kmeans.iterate(TIGHT, 520, iterations=6))
  for state in saved[0], saved[2]:
    assert state.assigner == 'screened'
    found = kmeans.fit(TIGHT, 520, iterations=6, init=state)
    fits.assert_same(found, saved[-1])


def test_another_method_does_not_use_the_state():
  centers = kmeans.fit(TIGHT, 520, iterations=1)
  for method, name in ('exact', 'plain'), ('auto', 'screened'):
    other = kmeans.fit(TIGHT, 520, iterations=2, init=centers, method=method)
    assert other.assigner == name
    centers = other._replace(objective=other.objective[:1])
  exact = list(kmeans.iterate(TIGHT, 520, iterations=2, method='exact'))
  again = kmeans.fit(TIGHT, 520, iterations=3, init=exact[-1])
  assert again.assigner == 'screened'
  assert again.counts.sum() == len(TIGHT)


@pytest.mark.parametrize('method', ['exact', SLOW_AUTO])
def test_goes_on_on_another_mesh_without_losing_rows(method):
  options = dict(iterations=4, method=method)
  saved = list(kmeans.iterate(TIGHT, 520, mesh=make_mesh(1, 1), **options))
  for state in saved[:3]:
    found = kmeans.fit(TIGHT, 520, mesh=make_mesh(4, 2), init=state, **options)
    assert found.counts.sum() == len(TIGHT)
    np.testing.assert_allclose(found.objective, saved[-1].objective, rtol=1e-4)


@pytest.mark.slow
def test_read_anew_or_held_gives_the_same_bits():
  held, streamed = (
    fits.states(
      TIGHT, 520, iterations=4, mesh=make_mesh(2, 1), chunk=1_024, hold=hold
    )[-1]
    for hold in (True, False)
  )
  assert held.assigner == 'screened'
  fits.assert_same(streamed, held)


@pytest.mark.parametrize(
  'method, rtol',
  [('exact', 1e-6), pytest.param('auto', 1e-4, marks=pytest.mark.slow)],
)
def test_meshes_agree(method, rtol):
  # Screened, the last bits of centers choose among equally good dimensions.
  one, four = (
    kmeans.fit(TIGHT, 520, iterations=3, method=method, mesh=make_mesh(*shape))
    for shape in ((1, 1), (2, 2))
  )
  assert one.assigner == four.assigner
  assert one.assigner_state.keys() == four.assigner_state.keys()
  np.testing.assert_allclose(one.objective, four.objective, rtol=rtol)


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
