"""Which classes a step draws: how many, how evenly, and where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mlcd_jax import config as config_lib
from mlcd_jax.train import sampling

NO_LABELS = jnp.full((1, 1), -1)


def make_draw(num_classes, count, *, rows=NO_LABELS, **fields):
  """Returns (key, first block, blocks) -> classes drawn there."""
  layout = sampling.Layout(num_classes)
  config = config_lib.default().loss
  config.update(fields)
  config.sample_rate = count / num_classes

  def drawn(key, first, blocks):
    num_local = blocks * layout.rows_per_block
    return sampling.draw(
      key,
      layout,
      rows,
      config=config,
      first=first * layout.rows_per_block,
      num_local=num_local,
    )

  drawn = jax.jit(drawn, static_argnums=2)

  def classes(key, first=0, blocks=layout.blocks):
    found = np.flatnonzero(drawn(key, jnp.int32(first), blocks))
    found = found + first * layout.rows_per_block
    return np.asarray(layout.class_of(found))

  return classes


@pytest.mark.parametrize(
  ('num_classes', 'count'),
  [(1_500, 150), (1_500, 1), (1_500, 1_499), (1_500, 1_500), (5_000, 77)],
)
def test_uniform_draws_exactly_so_many(num_classes, count):
  classes = make_draw(num_classes, count)
  layout = sampling.Layout(num_classes)
  for i in range(20):
    drawn = classes(jax.random.key(i))
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert drawn.max() < num_classes
    per_device = np.bincount(np.asarray(layout.row_of(drawn)) // layout.rows)
    config = config_lib.default().loss
    config.sample_rate = count / num_classes
    assert per_device.max() <= sampling.capacity(
      layout, config, num_labels=8, num_local=layout.rows
    )


@pytest.mark.parametrize(('num_classes', 'count'), [(1_500, 90), (8_000, 800)])
def test_every_class_is_drawn_as_often(num_classes, count):
  classes = make_draw(num_classes, count)
  times = 600
  seen = np.zeros(num_classes)
  for i in range(times):
    seen[classes(jax.random.key(i))] += 1
  # Of a class's `times` trials the count is binomial, and the sum is fixed.
  rate = count / num_classes
  statistic = np.sum((seen - times * rate) ** 2) / (times * rate * (1 - rate))
  assert 0.001 < stats.chi2.sf(statistic, num_classes - 1) < 0.999
  # Nor does it depend on where in its block a class lies.
  places = np.arange(num_classes) // sampling.Layout(num_classes).blocks
  by_place = np.bincount(places, seen) / np.bincount(places)
  spread = np.sqrt(times * rate / np.bincount(places))
  assert np.all(np.abs(by_place - times * rate) < 4.5 * spread)


def test_partial_fc_keeps_all_positives_and_fills_up():
  num_classes, count = 20_000, 2_000
  layout = sampling.Layout(num_classes)
  labels = np.random.default_rng(0).integers(0, num_classes, (40, 8))
  labels[0] = -1
  classes = make_draw(
    num_classes,
    count,
    rows=layout.row_of(jnp.asarray(labels)),
    negatives='partial_fc',
  )
  positives = set(labels[labels >= 0].tolist())
  seen = np.zeros(num_classes)
  for i in range(200):
    drawn = set(classes(jax.random.key(i)).tolist())
    assert positives <= drawn
    # More only where a block has more positives than its share of two.
    assert count <= len(drawn) < count + 0.05 * len(positives)
    seen[list(drawn)] += 1
  assert np.all(seen[list(positives)] == 200)
  others = np.setdiff1d(np.arange(num_classes), list(positives))
  expected = 200 * (count - len(positives)) / len(others)
  assert abs(seen[others].mean() / expected - 1) < 0.02


def test_partial_fc_keeps_more_positives_than_the_rate_has_room_for():
  num_classes = 2_000
  labels = jnp.arange(0, 1_000)[None]
  classes = make_draw(
    num_classes,
    100,
    rows=sampling.Layout(num_classes).row_of(labels),
    negatives='partial_fc',
  )
  assert set(range(1_000)) <= set(classes(jax.random.key(0)).tolist())


@pytest.mark.parametrize('parts', [8, 6, 24])
@pytest.mark.parametrize('negatives', sampling.MODES)
def test_devices_draw_their_part_of_the_same_classes(negatives, parts):
  num_classes = 3_000
  layout = sampling.Layout(num_classes)
  rows = layout.row_of(jnp.arange(50).reshape(10, 5))
  classes = make_draw(num_classes, 300, rows=rows, negatives=negatives)
  key = jax.random.key(5)
  blocks = layout.rows_over(parts) // parts // layout.rows_per_block
  found = [classes(key, i * blocks, blocks) for i in range(parts)]
  np.testing.assert_array_equal(np.concatenate(found), classes(key))


def test_layout_spreads_classes_evenly():
  layout = sampling.Layout(1_500)
  rows = np.asarray(layout.row_of(jnp.arange(1_500)))
  np.testing.assert_array_equal(layout.class_of(rows), np.arange(1_500))
  assert layout.row_of(jnp.array(-1)) == -1
  # Blocks that only fill up the devices' shares have no class.
  more = np.arange(layout.rows, layout.rows_over(80))
  assert len(more) and np.all(layout.class_of(more) >= 1_500)
  first_eighty = np.bincount(rows[:80] // (layout.rows // 1_024))
  assert first_eighty.max() == 1  # Neighbours lie in different blocks.


@pytest.mark.parametrize('num_classes', [1_000_000, 320_000, 100_000])
def test_popular_clusters_do_not_pile_up(num_classes):
  """Sizes follow Zipf's law and centers are sorted by size."""
  devices = 256
  layout = sampling.Layout(num_classes)
  size = 1 / (np.arange(num_classes) + 100.0)
  device = np.asarray(layout.row_of(jnp.arange(num_classes)))
  load = np.bincount(device // (layout.rows // devices), size, devices)
  classes = np.bincount(device // (layout.rows // devices))
  assert load.max() < 1.25 * load.mean()
  assert classes.max() - classes.min() <= layout.blocks // devices
