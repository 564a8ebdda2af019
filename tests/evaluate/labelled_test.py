"""Images without a label: left out of every task, counted, never guessed."""

import io
import logging
import tarfile

from flax import linen as nn
import jax
import numpy as np
from PIL import Image
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import labelled
from mlcd_jax.evaluate import lit
from mlcd_jax.evaluate import scores
from mlcd_jax.evaluate import stage
from mlcd_jax.evaluate.tasks import knn
from mlcd_jax.evaluate.tasks import retrieval
from mlcd_jax.page import agreement
from mlcd_jax.runtime import errors
from tests.evaluate import blobs

_WORDS = ('ash', 'bay', 'oak')
_OF_CLASSES = ('linear', 'knn', 'few_shot', 'zero_shot', 'retrieval')


def png(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(out, 'PNG')
  return out.getvalue()


class Trees:
  """A source of small noisy pictures of three classes that overlap."""

  class_names = _WORDS

  def __init__(self, numbers, missing=lambda number: False, num_classes=3):
    self.numbers, self.missing = list(numbers), missing
    self.num_classes = num_classes
    self.num_attributes = 3

  def __len__(self):
    return len(self.numbers)

  def __getitem__(self, index):
    number = self.numbers[index]
    label = number % (self.num_classes or 3)
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 99, (16, 16, 3), np.uint8) + 4 * label
    without = self.missing(number)
    return {
      'key': f'{number:04d}',
      'image': png(pixels),
      'label': -1 if without else label,
      'caption': f'{_WORDS[label]}\nsome {_WORDS[label]}',
      'attributes': np.array(
        [-1] if without else np.unique([label, rng.integers(3)])
      ),
    }

  def keys(self):
    return np.array([f'{number:04d}'.encode() for number in self.numbers])


def even(number):
  return number % 2 == 0


def make_config(*tasks, metric='accuracy'):
  config = config_lib.default()
  config.evaluate.tasks = tasks
  config.evaluate.batch_size = 16
  config_lib.add_dataset(config, 'x', metric=metric, prompts='x')
  return config


def mean_colours():
  return encoders.Encoder(
    16, lambda images: images.reshape(len(images), -1, 3).mean(1) / 99
  )


def score(train, test, config, encoder=None):
  return stage.score(
    config,
    encoder or mean_colours(),
    {'x': {'train': train, 'test': test}},
    name='trained',
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )


@pytest.fixture(name='towers')
def fixture_towers(monkeypatch):
  """Texts in the space of the colours, in place of a tuned tower."""
  shades = {
    word: np.array([1.0, 0.5 + i, 1.0]) for i, word in enumerate(_WORDS)
  }

  def texts(found):
    return np.array([shades[text.split()[-1]] for text in found], np.float32)

  monkeypatch.setattr(
    lit, 'towers', lambda data, config: lit.Towers(lambda rows: rows, texts)
  )
  monkeypatch.setattr(
    'mlcd_jax.evaluate.prompts.sentences',
    lambda *args, **kwargs: [[word] for word in _WORDS],
  )


# Of train and test: what lacks its label, and what is left of it.
_CASES = {
  'train': ((range(60), even), (range(60, 90), None)),
  'test': ((range(1, 60, 2), None), (range(60, 120), even)),
  'both': ((range(60), even), (range(60, 120), even)),
}


def alone(numbers, missing):
  return Trees([n for n in numbers if not (missing and missing(n))])


@pytest.mark.parametrize('case', _CASES)
def test_the_score_is_that_of_the_labelled_alone(case, towers):
  config = make_config(*_OF_CLASSES)
  parts = _CASES[case]
  partly = [Trees(n, missing or (lambda number: False)) for n, missing in parts]
  found = score(*partly, config)
  assert found == score(*(alone(*part) for part in parts), config)
  assert {name.split('/')[1] for name in found} == set(_OF_CLASSES)
  assert found['x/knn/accuracy_count'] == 30
  assert found['x/retrieval/image_map_count'] == 30
  assert found['x/zero_shot/accuracy_count'] == 30
  assert 0.4 < found['x/linear/accuracy'] < 1


@pytest.mark.parametrize(
  'metric', ['mean_per_class', 'mean_top1_top5', 'roc_auc', 'map_11_point']
)
def test_every_metric_and_several_labels(metric):
  tasks = ('linear', 'multi_label') if metric == 'map_11_point' else ('linear',)
  config = make_config(*tasks, metric=metric)
  parts = _CASES['both']
  partly = [Trees(numbers, missing) for numbers, missing in parts]
  whole = [alone(*part) for part in parts]
  found = score(*partly, config)
  assert found == score(*whole, config)
  assert found[f'x/linear/{metric}_count'] == 30
  if len(tasks) > 1:
    assert found['x/multi_label/mAP_count'] == 30


class Tiny(nn.Module):
  """The least that can be tuned."""

  image_size: int = 16
  depth: int = 1

  @nn.compact
  def __call__(self, images):
    return {'pooled': nn.Dense(4)(images.mean((1, 2)) / 99)}


def test_fine_tuning_sees_the_labelled_alone():
  config = make_config('finetune')
  config.evaluate.finetune_batch_size = 16
  model = Tiny()
  params = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))['params']
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  encoder = encoders.from_model(model, params, mesh)
  parts = _CASES['both']
  partly = [Trees(numbers, missing) for numbers, missing in parts]
  found = score(*partly, config, encoder)
  assert found == score(*(alone(*p) for p in parts), config, encoder)
  assert found['x/finetune/accuracy_count'] == 30


def test_a_class_may_be_missing_where_attributes_are_known():
  x, y = blobs.draw(30)
  source = Trees(range(30))
  split = features.Split(x, np.where(y == 1, -1, y), np.arange(30), source)
  assert len(split.labelled(several=True)) == 30
  kept = split.labelled(several=False)
  assert len(kept) == len(kept.source) == np.sum(y != 1)
  np.testing.assert_array_equal(kept.features, x[y != 1])
  np.testing.assert_array_equal(kept.hot(), split.hot()[y != 1])


def test_without_classes_pairs_need_no_label(towers):
  config = make_config('retrieval')
  config.evaluate.datasets.x.prompts = ''
  source = Trees(range(20), lambda number: True, num_classes=0)
  found = stage.score(
    config, mean_colours(), {'x': {'test': source}}, name='trained',
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )  # fmt: skip
  assert found['x/retrieval/image_to_text_recall1_count'] == 20


def test_told_once_for_all_encoders_and_tasks(caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger('mlcd_jax'), 'propagate', True)
  labelled._tell.cache_clear()
  config = make_config('knn', 'retrieval')
  monkeypatch.setattr(lit, 'towers', lambda data, config: None)
  for _ in range(2):
    score(Trees(range(60), even), Trees(range(60, 90)), config)
  lines = [r.getMessage() for r in caplog.records if 'left out' in r.message]
  assert lines == [
    'evaluate: x train: 30 of 60 images have no class and are left out'
  ]


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_a_split_without_any_label_is_refused(split):
  config = make_config('knn')
  config.evaluate.datasets.x.validation_split = 'dev'
  given = {name: Trees(range(9)) for name in ('train', 'validation', 'test')}
  given[split] = Trees(range(9), lambda number: True)
  name = config.evaluate.datasets.x[f'{split}_split']
  message = f'datasets.x.{split}_split={name}: no image.*x.label_key=label'
  with pytest.raises(errors.UserError, match=message):
    labelled.check('x', config, given)
  # As where those with a label cannot be decoded.
  with pytest.raises(errors.UserError, match=message):
    stage.score(
      config, mean_colours(), {'x': given}, name='trained',
      mesh=sharding.make_mesh(),
    )  # fmt: skip
  config.evaluate.tasks = ('multi_label',)  # Needs no class.
  labelled.check('x', config, given)


def test_a_tar_without_any_label_is_refused_first(tmp_path):
  for split, suffix in (('train', 'cls'), ('test', 'txt')):
    with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
      for i in range(4):
        image = png(np.zeros((8, 8, 3)))
        for name, content in (('png', image), (suffix, b'%d' % i)):
          info = tarfile.TarInfo(f'{i}.{name}')
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  config = config_lib.default()
  config.data.source, config.data.path = (
    'webdataset',
    f'{tmp_path}/{{split}}.tar',
  )
  config.data.label_key, config.data.cache_dir = 'cls', str(tmp_path / 'cache')
  config_lib.add_dataset(config, 'x')
  with pytest.raises(errors.UserError, match='x.test_split=test: no image'):
    stage.open_sources(config)


def test_classes_of_the_test_split_alone_are_counted():
  config = make_config('linear', 'knn', metric='mean_top1_top5')
  train, test = Trees(range(30), num_classes=2), Trees(range(30, 60))
  found = score(train, test, config)
  assert found['x/linear/mean_top1_top5_count'] == 30
  assert found['x/knn/accuracy'] < 0.7  # A third is of an unknown class.


@pytest.mark.parametrize('first', [0, 10**15, 48_101_997])
def test_large_class_numbers_need_no_large_arrays(first):
  rng = np.random.default_rng(0)
  right, labels = rng.random(30), first + rng.integers(0, 3, 30)
  expected = np.mean([right[labels == c].mean() for c in np.unique(labels)])
  assert scores.mean_per_class(right, labels) == pytest.approx(expected)
  x, y = blobs.draw(60)
  found, wanted = (
    blobs.run(knn, (x, y + offset), (x, y + offset), first + 4)
    for offset in (np.int64(first), 0)
  )
  assert found == wanted
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert len(retrieval.images(x, y, mesh=mesh)['image_map']) == 60
  assert agreement.majority({1: first + 4, 2: first + 4, 3: first}) == first + 4
