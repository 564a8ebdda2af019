"""Which encoders are scored, when, and what is kept for the next time."""

import json
import pathlib
import re
import shutil
import types

from flax import linen as nn
import jax
import numpy as np
import pytest

from mlcd_jax import config as config_lib
from mlcd_jax import report
from mlcd_jax import sharding
from mlcd_jax import stages
from mlcd_jax.data import sources
from mlcd_jax.evaluate import encoders as evaluate_encoders
from mlcd_jax.evaluate import features
from mlcd_jax.evaluate import stage
from mlcd_jax.evaluate import table
from mlcd_jax.evaluate import tasks
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import load as load_lib

_CLIP = pathlib.Path(__file__).parent.parent / 'goldens/clip'


def test_every_task_has_a_function():
  assert tuple(tasks.RUN) == config_lib.TASKS


def test_all_means_all_and_commas_separate(tiny_config):
  tiny_config.evaluate.tasks = ('all',)
  assert config_lib.tasks(tiny_config) == config_lib.TASKS
  tiny_config.evaluate.tasks = ('few_shot,linear',)
  assert config_lib.tasks(tiny_config) == ('linear', 'few_shot')


class Counting:
  """Mean colours; counts the images."""

  def __init__(self, factor=1.0):
    self.seen, self.factor = 0, factor

  def __call__(self, images):
    self.seen += len(images)
    return self.factor * images.mean((1, 2)).astype(np.float32)


def extract(encode, source, folder):
  encoder = evaluate_encoders.Encoder(28, encode)
  return features.Extractor(encoder, 'x', 16, folder)(
    source, 'digits test[:40]'
  )


def test_features_are_extracted_once(tiny_config, tmp_path):
  source = sources.make(tiny_config.evaluate.datasets.digits, 'test[:40]')
  first, again, other = Counting(), Counting(), Counting(2.0)
  made = extract(first, source, tmp_path)
  assert first.seen == 48 and made.features.shape == (40, 3)
  np.testing.assert_array_equal(made.labels, made.values('label'))
  kept = extract(again, source, tmp_path)
  assert again.seen == 16  # The first batch says whether it is the same.
  np.testing.assert_array_equal(kept.features, made.features)
  np.testing.assert_array_equal(kept.labels, made.labels)
  changed = extract(other, source, tmp_path)
  assert other.seen == 48
  np.testing.assert_array_equal(changed.features, 2 * made.features)
  fewer = sources.make(tiny_config.evaluate.datasets.digits, 'test[:20]')
  assert len(extract(Counting(2.0), fewer, tmp_path)) == 20


def test_released_weights_are_scored_alone(tiny_config, tmp_path, capsys):
  tiny_config.evaluate.encoder = str(_CLIP)
  tiny_config.evaluate.tasks = ('knn',)
  stages.run(tiny_config, tmp_path, ('evaluate',))
  results = json.loads((tmp_path / 'results.json').read_text())
  assert {k.split('/')[0] for k in results} == {'trained', 'raw'}
  assert results['trained/digits/knn/accuracy_count'] == 100
  tiny_config.evaluate.baselines = ()
  stages.run(tiny_config, tmp_path / 'alone', ('evaluate',))
  alone = json.loads((tmp_path / 'alone' / 'results.json').read_text())
  assert alone == {k: v for k, v in results.items() if 'raw/' not in k}
  assert not (tmp_path / 'embeddings').exists()
  assert re.search(
    r'trained .*digits .*knn .*accuracy .*100', capsys.readouterr().out
  )
  assert str(_CLIP) in report.table([tmp_path])


def test_released_weights_are_prepared_as_they_say(tmp_path):
  folder = shutil.copytree(_CLIP, tmp_path / 'clip')
  (folder / 'preprocessor_config.json').write_text(
    json.dumps({'size': 40, 'crop_size': 36, 'do_center_crop': True})
  )
  encoder = evaluate_encoders.load(str(folder), sharding.make_mesh())
  assert encoder.image_size == 36
  pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  image = encoder.prepare(pixels)
  assert image.shape == (36, 36, 3)
  rows = encoder.encode(np.stack([image] * 8))
  model, variables, _ = load_lib.load(str(_CLIP), 'x')
  np.testing.assert_allclose(
    rows[:1], model.apply(variables, image[None])['pooled'], atol=1e-5
  )


def test_missing_encoder_is_refused_first(tiny_config, tmp_path):
  tiny_config.evaluate.encoder = '/no/such'
  with pytest.raises(errors.UserError, match='evaluate.encoder=/no/such'):
    stages.run(tiny_config, tmp_path)
  assert not (tmp_path / 'embeddings').exists()


def test_scored_inside_training_after_it_and_from_elsewhere(
  tiny_config, tmp_path
):
  tiny_config.evaluate.every_steps = 6
  tiny_config.evaluate.tasks = ('knn',)
  run, other = tmp_path / 'run', tmp_path / 'other'
  stages.run(tiny_config, run)
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  name = 'evaluate/digits/knn/accuracy'
  scored = {line['step']: line[name] for line in lines if name in line}
  assert list(scored) == [6, 12]
  after = json.loads((run / 'results.json').read_text())
  assert scored[12] == after['trained/digits/knn/accuracy']
  assert [line['step'] for line in lines if 'train/loss' in line] == list(
    range(1, 13)
  )
  tiny_config.evaluate.encoder = str(run)
  stages.run(tiny_config, other, ('evaluate',))
  elsewhere = json.loads((other / 'results.json').read_text())
  assert elsewhere['trained/digits/knn/accuracy'] == scored[12]


@pytest.fixture(name='traced')
def fixture_traced():
  """The functions that JAX traces from here on."""
  names = []

  def listen(event, seconds, fun_name='', **kwargs):
    if event == '/jax/core/compile/jaxpr_trace_duration':
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


class Tiny(nn.Module):
  """The least that can be scored and tuned."""

  image_size: int = 28
  depth: int = 1

  @nn.compact
  def __call__(self, images):
    return {'pooled': nn.Dense(4)(images.mean((1, 2)))}


def test_inside_training_nothing_is_compiled_twice(tiny_config, traced):
  tiny_config.evaluate.tasks = ('knn', 'finetune', 'zero_shot')
  tiny_config.evaluate.finetune_epochs = 0.1  # One step.
  tiny_config.lit.update(steps=2, width=8, depth=1, context=8)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluate = stage.inside_training(tiny_config)
  for number in range(2):
    # As at another step of a run, and in another run of the same process.
    program = types.SimpleNamespace(model=Tiny(), mesh=mesh)
    images = np.zeros((1, 28, 28, 3))
    params = Tiny().init(jax.random.key(number), images)['params']
    params = sharding.put(mesh, sharding.REPLICATED, jax.device_get(params))
    inside = len(traced)
    found = evaluate(program, params)
    assert bool(traced[inside:]) == (number == 0), traced[inside:]
    assert found['evaluate/digits/finetune/accuracy_count'] == 100
    assert found['evaluate/digits/zero_shot/accuracy_count'] == 100


def test_undefined_is_null(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setitem(
    tasks.RUN, 'knn', lambda data, config: {'a': float('nan'), 'b': 1.0}
  )
  tiny_config.evaluate.encoder = str(_CLIP)
  tiny_config.evaluate.tasks = ('knn',)
  stages.run(tiny_config, tmp_path, ('evaluate',))
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['raw/digits/knn/a'] is None
  assert results['raw/digits/knn/b'] == 1.0


def test_report_shows_the_map_of_images_with_several_labels(tmp_path):
  name = 'trained/scenes/multi_label/mAP'
  folders = [tmp_path / rule for rule in ('nearest', 'views')]
  for folder in folders:
    folder.mkdir()
    files.write_json(
      folder / 'results.json',
      {name: 0.5, f'{name}_low': 0.45, f'{name}_high': 0.625},
    )
    files.write_json(
      folder / 'config.json',
      {
        'loss': {'num_positives': 8},
        'cluster': {'rule': folder.name},
        'evaluate': {},
      },
    )
  heads, _, *rows = report.table(folders).splitlines()
  cells = [[c.strip() for c in r.split('|')[1:-1]] for r in (heads, *rows)]
  score = ['scenes', '50.0 (45.0-62.5)']
  assert cells == [
    ['features', 'data', 'multi-label mAP'],
    ['trained encoder, 8 labels an image', *score],
    ['trained encoder, 8 labels an image, of its crops', *score],
  ]


def test_table_has_a_line_a_metric():
  found = table.table(
    {
      'raw/digits/linear/accuracy': 0.5,
      'trained/digits/linear/accuracy': 0.75,
      'trained/digits/linear/accuracy_low': 0.7,
      'trained/digits/linear/accuracy_high': 0.8,
      'trained/digits/linear/accuracy_count': 100,
      'trained/digits/linear/penalty': 10.0,
      'trained/digits/linear/objective': 0.25,
      'trained/digits/linear/iterations': 30,
      'trained/digits/linear/converged': 1,
      'trained/digits/knn/accuracy': None,
      # In results.json and on the page only.
      'trained/digits/multi_label/recall_small': 0.5,
    }
  ).splitlines()
  assert len(found) == 5
  assert [c.strip() for c in found[2].split('|')[1:-1]] == [
    'trained', 'digits', 'linear', 'accuracy', '0.7500', '0.7000 to 0.8000',
    '100',
  ]  # fmt: skip
  assert 'undefined' in found[4]
