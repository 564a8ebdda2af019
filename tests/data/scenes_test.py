"""The embedded scenes are what their docstring says."""

import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.config import choices
from mlcd_jax.data import digits
from mlcd_jax.data import scenes
from mlcd_jax.data import sources
from mlcd_jax.data import transforms


@pytest.fixture(scope='module', name='glyphs')
def fixture_glyphs():
  pixels, labels, rows = digits.read()
  train = rows['train'][:200]
  return [scenes.cut(p) for p in pixels[train]], labels[train]


def compose(glyphs, seed, name='free', **fields):
  config = {c.name: c for c in scenes.CONFIGS}[name]
  for field, value in fields.items():
    config = _with(config, field, value)
  return scenes.compose(config, *glyphs, np.random.default_rng(seed))


def _with(config, field, value):
  fields = {
    f: getattr(config, f)
    for f in scenes.ScenesConfig.__annotations__ | {'name': ''}
  }
  return scenes.ScenesConfig(**fields | {field: value})


def drawn(scene, box):
  left, top, right, bottom = box
  return scene.pixels[top:bottom, left:right].max(-1) > 128


def test_a_box_holds_its_object_and_touches_it_on_all_sides(glyphs):
  for seed in range(20):
    scene = compose(
      glyphs, seed, num_objects=(1, 1), clutter=0, noise=0, overlap=0
    )
    (box,) = scene.boxes
    bright = scene.pixels.max(-1) > 60
    y, x = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    found = x[0], y[0], x[-1] + 1, y[-1] + 1
    # The pen's soft edge may be too dark to count.
    np.testing.assert_allclose(found, box, atol=1)


@pytest.mark.parametrize('name, fewest, most, overlap', [
  ('free', 2, 6, 2), ('quadrants', 4, 4, 2), ('crowded', 2, 6, 6),
])  # fmt: skip
def test_objects_overlap_little_and_are_as_many_as_asked(
  glyphs, name, fewest, most, overlap
):
  counts = []
  for seed in range(50):
    scene = compose(glyphs, seed, name)
    counts.append(len(scene.boxes))
    side = len(scene.pixels)
    assert (scene.boxes >= 0).all() and (scene.boxes <= side).all()
    for i, a in enumerate(scene.boxes):
      for b in scene.boxes[:i]:
        shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        assert shared.min() <= overlap
      assert drawn(scene, a).any()
  assert fewest <= min(counts) and max(counts) == most


def test_quadrants_have_four_different_digits_one_in_each(glyphs):
  for seed in range(300):
    scene = compose(glyphs, seed, 'quadrants')
    assert len(scene.boxes) == len(set(scene.labels)) == 4
    middles = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2 > 28
    np.testing.assert_array_equal(middles, [[0, 0], [1, 0], [0, 1], [1, 1]])
    assert (scene.pixels == scene.pixels[..., :1]).all()


def test_the_colour_is_that_of_the_pixels(glyphs):
  palette = np.array(list(scenes.COLOURS.values()))
  for seed in range(20):
    scene = compose(glyphs, seed, clutter=0, noise=0, overlap=0)
    for box, colour in zip(scene.boxes, scene.colours):
      left, top, right, bottom = box
      part = scene.pixels[top:bottom, left:right].reshape(-1, 3)
      brightest = part[part.sum(1).argmax()].astype(int)
      assert np.abs(palette - brightest).sum(1).argmin() == colour


def test_the_same_seed_gives_the_same_scene(glyphs):
  a, b, c = (compose(glyphs, seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(a.pixels, b.pixels)
  assert a.pixels.shape != c.pixels.shape or (a.pixels != c.pixels).any()


def test_splits_and_records(glyphs):
  data = config_lib.default().data
  data.path = 'scenes'
  opened = {
    split: sources.make(data, split)
    for split in ('train', 'validation', 'test')
  }
  assert [len(s) for s in opened.values()] == [6_000, 1_000, 2_000]
  record = opened['train'][0]
  assert transforms.decode(record['image']).shape == (64, 64, 3)
  words = record['caption'].replace(' and ', ', ').split(', ')
  assert 2 <= len(words) <= 6
  for word in words:
    _, colour, digit = word.split()
    assert colour in scenes.COLOURS and digit in digits.WORDS


def test_records_have_the_boxes_of_the_objects():
  data = config_lib.default().data
  data.path = 'scenes'
  data.attributes_key = 'objects/label'
  data.boxes_key = 'objects/bbox'
  source = sources.make(data, 'validation')
  assert source.num_attributes == 10
  records = {}
  for i in range(len(source)):
    record = source[i]
    records[transforms.decode(record['image']).tobytes()] = record
  pixels, labels, rows = digits.read()
  glyphs = [scenes.cut(p) for p in pixels[rows['validation']]]
  for i in range(5):
    scene = compose((glyphs, labels[rows['validation']]), (1, i))
    record = records[scene.pixels.tobytes()]
    np.testing.assert_array_equal(record['box_labels'], scene.labels)
    np.testing.assert_array_equal(record['attributes'], np.unique(scene.labels))
    np.testing.assert_allclose(record['boxes'], scene.boxes, atol=1e-4)


def test_no_digit_is_in_two_splits():
  _, _, rows = digits.read()
  assert sum(map(len, rows.values())) == 5_000
  assert len(np.unique(np.concatenate(list(rows.values())))) == 5_000


def test_every_name_can_be_chosen():
  names = [f'scenes/{config.name}' for config in scenes.CONFIGS]
  assert set(choices.EMBEDDED) == {'digits', 'scenes', *names[1:]}
