"""Zero-shot by a tuned text tower and by a released one."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from mlcd_jax import config as config_lib
from mlcd_jax import sharding
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import lit
from mlcd_jax.evaluate import stage
from mlcd_jax.evaluate.tasks import retrieval
from mlcd_jax.evaluate.tasks import zero_shot
from mlcd_jax.runtime import errors
from tests.evaluate import blobs

_TESTS = pathlib.Path(__file__).parents[2]
_WORDS = ('cat', 'dog', 'cow', 'fox')


class Told:
  """A source of captions only, two an image."""

  class_names = _WORDS

  def __init__(self, labels):
    self.labels = labels

  def __getitem__(self, row):
    word = _WORDS[self.labels[row]]
    return {'caption': f'a {word}\n\n  the {word} \n'}


def split(num, seed):
  rows, labels = blobs.draw(num, noise=0.3, seed=seed)
  return features.Split(rows, labels, np.arange(num), Told(labels))


def make_config(**fields):
  config = config_lib.default()
  config.lit.update(
    steps=60, batch_size=64, width=16, depth=1, context=6, dtype='float32',
    learning_rate=1e-2,
  )  # fmt: skip
  config.lit.update(fields)
  config.optimizer.warmup_steps = 0
  return config


def make_data(tmp_path, monkeypatch, test=None, **dataset):
  path = tmp_path / 'animals.json'
  path.write_text('{"animals": {"templates": ["a {c}", "the {c}"]}}')
  config = config_lib.default()
  config_lib.add_dataset(config, 'x', prompts=f'{path}:animals', **dataset)
  monkeypatch.setattr(sources, 'make', lambda data: None)
  return features.Data(
    None,
    test or split(80, seed=1),
    4,
    sharding.make_mesh(),
    encoder=encoders.Encoder(28, None),
    extract=lambda source, name: split(400, seed=0),
    config=config.evaluate.datasets.x,
  )


@pytest.mark.parametrize('loss', ['softmax', 'sigmoid'])
def test_a_tuned_tower_knows_the_classes(loss, tmp_path, monkeypatch):
  data = make_data(tmp_path, monkeypatch)
  config = make_config(loss=loss)
  assert zero_shot.run(data, config)['accuracy'] > 0.9
  made = data.shared['towers']
  found = retrieval.run(data, config)
  assert data.shared['towers'] is made
  assert found['text_to_image_recall1'] == 1
  assert found['image_to_text_recall5'] > 0.9
  assert found['image_to_text_recall1_count'] == 80
  assert found['text_to_image_recall1_count'] == 8  # Two texts a class.


def test_every_mesh_tunes_the_same_tower():
  train = split(100, seed=0)
  config = make_config(steps=4)
  model, words = lit._make_tower(config.lit, 12)
  found = []
  for mesh in (sharding.make_mesh(1, devices=jax.devices()[:1]),
               sharding.make_mesh(4, 2)):  # fmt: skip
    params = lit.train(
      model, words, train.features, lit.captions(train),
      config=config, mesh=mesh,
    )  # fmt: skip
    found.append(jax.device_get(params['projection']['kernel']))
  np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_present_classes_are_all_that_is_predicted(tmp_path, monkeypatch):
  config = make_config(steps=1)  # Knows nothing yet.
  whole = split(80, seed=1)
  rows = whole.labels == 2
  test = features.Split(
    whole.features[rows],
    whole.labels[rows],
    whole.records[rows],
    whole.source,
  )
  data = make_data(tmp_path, monkeypatch, test, present_classes=True)
  assert zero_shot.run(data, config)['accuracy'] == 1
  data = make_data(tmp_path, monkeypatch, test)
  assert zero_shot.run(data, config)['accuracy'] < 1


def test_a_class_weighs_as_the_mean_of_its_sentences():
  rows = {'a': [3.0, 4.0], 'b': [1.0, 0.0], 'c': [0.0, 2.0], 'd': [0.0, 2.0]}
  towers = lit.Towers(None, lambda texts: np.array([rows[t] for t in texts]))
  found = zero_shot.class_weights(towers, [['a', 'b'], ['c', 'd']])
  mean = np.array([2.0, 2.0])
  np.testing.assert_allclose(
    found, [mean / np.linalg.norm(mean), [0.0, 1.0]], rtol=1e-6
  )


def test_without_captions_nothing_can_be_tuned(tiny_config, monkeypatch):
  tiny_config.evaluate.tasks = ('retrieval',)
  tiny_config.data.caption_key = 'text'
  with pytest.raises(errors.UserError, match='caption_key=text: no captions'):
    stage.open_sources(tiny_config)
  tiny_config.lit.steps = 0
  stage.open_sources(tiny_config)


def test_no_prompts_or_no_tower_leave_texts_out(tmp_path, monkeypatch):
  data = make_data(tmp_path, monkeypatch)
  config = make_config(steps=0)
  assert zero_shot.run(data, config) == {}
  assert not any('text' in metric for metric in retrieval.run(data, config))
  data = make_data(tmp_path, monkeypatch)
  data.config.prompts = ''
  assert zero_shot.run(data, make_config()) == {}


def test_prompts_are_checked_before_anything_is_begun(tiny_config):
  tiny_config.evaluate.tasks = ('zero_shot',)
  tiny_config.evaluate.datasets.digits.prompts = 'pets'
  with pytest.raises(
    errors.UserError, match='digits.prompts=pets: 37 class names for 10'
  ):
    stage.open_sources(tiny_config)


def test_devices_must_divide_the_batch(tmp_path, monkeypatch):
  data = make_data(tmp_path, monkeypatch)
  with pytest.raises(errors.UserError, match='lit.batch_size=20.*8 devices'):
    zero_shot.run(data, make_config(batch_size=20))


@pytest.fixture(name='clip')
def fixture_clip(tmp_path):
  """A CLIP folder with both towers and words of its own."""
  folder = shutil.copytree(_TESTS / 'text_goldens/both_towers', tmp_path / 'c')
  names = 'zero one two three four five six seven eight nine'.split()
  vocab = {name: i for i, name in enumerate(['?', *names])}
  vocab['<|endoftext|>'] = 39
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '?'))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A <|endoftext|>', special_tokens=[('<|endoftext|>', 39)]
  )
  words.save(str(folder / 'tokenizer.json'))
  return folder


def test_a_clip_folder_needs_no_tuning(clip, tiny_config, monkeypatch):
  monkeypatch.setattr(lit, 'train', None)
  tiny_config.evaluate.tasks = ('zero_shot', 'retrieval')
  tiny_config.evaluate.datasets.digits.train_split = ''
  mesh = sharding.make_mesh()
  encoder = encoders.load(str(clip), mesh)
  datasets = stage.open_sources(tiny_config)
  results = stage.score(
    tiny_config, encoder, datasets, name='trained', mesh=mesh
  )
  assert results['digits/zero_shot/accuracy_count'] == 100
  assert 0 <= results['digits/zero_shot/accuracy'] <= 1
  assert 'digits/retrieval/text_to_image_recall10' in results

  extract = features.Extractor(encoder, 'trained', 64)
  test = extract(datasets['digits']['test'], 'test')
  data = features.Data(None, test, 10, mesh, encoder, extract)
  towers = lit.towers(data, tiny_config)
  image = encoder.prepare(np.full((28, 28, 3), 200, np.uint8))
  out = encoder.model.apply({'params': encoder.params}, image[None])
  expected = out['embedding'] / np.linalg.norm(out['embedding'])
  np.testing.assert_allclose(
    towers.images(np.asarray(out['pooled'])), expected, atol=1e-5
  )
  assert towers.texts(['one', 'a two']).shape == (2, 6)
