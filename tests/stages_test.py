"""The whole job, shrunk: artefacts, skipping, staleness, sharing, locking."""

import fcntl
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mlcd_jax import manifests
from mlcd_jax import models
from mlcd_jax import report
from mlcd_jax import stages
from mlcd_jax.config import fields as config_fields
from mlcd_jax.embed import shards
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import files
from mlcd_jax.weights import export


@pytest.fixture(scope='module', name='folder')
def fixture_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('job') / 'run'


@pytest.fixture(name='done')
def fixture_done(tiny_config, folder):
  """A finished run; made once, and only read."""
  tiny_config.mesh.fsdp = 2
  stages.run(tiny_config, folder)
  return folder


@pytest.fixture(name='copy')
def fixture_copy(done, tmp_path):
  return shutil.copytree(done, tmp_path / 'copy')


def snapshot(folder):
  return {
    p: p.stat().st_mtime_ns
    for p in folder.rglob('*')
    if p.is_file() and p.name not in ('config.json', 'lock')
  }


def test_artefacts(done, tiny_config):
  config = json.loads((done / 'config.json').read_text())
  assert config['cluster']['num_centers'] == 64
  rows = shards.Embeddings(done / 'embeddings', 3)
  assert rows.shape == (300, 324)

  centers = np.load(done / 'clusters/centers.npy')
  assert centers.dtype == np.float32 and centers.shape == (64, 324)
  np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
  clustering = json.loads((done / 'clusters/clustering.json').read_text())
  assert len(clustering['objective']) == 5
  assert clustering['objective'][-1] > clustering['objective'][0]

  labels = np.load(done / 'clusters/labels_00001.npy')
  scores = np.load(done / 'clusters/scores_00001.npy')
  assert labels.dtype == np.int32 and labels.shape == (100, 10)
  assert scores.dtype == np.float16
  dense = rows[100:200].astype(np.float32) @ centers.T
  np.testing.assert_array_equal(labels[:, 0], dense.argmax(1))
  np.testing.assert_allclose(
    scores, -np.sort(-dense, axis=1)[:, :10], atol=2e-3
  )

  lines = (done / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(range(1, 13))
  assert any((done / 'tensorboard').iterdir())
  assert (done / 'checkpoints/12').is_dir()
  page = (done / 'report.html').read_text()
  for part in ('"text":"finished"', '"patches":[{', '"quality":{'):
    assert part in page
  for stage in ('embeddings', 'clusters', 'checkpoints', 'evaluation'):
    assert json.loads((done / stage / 'manifest.json').read_text())['complete']


def test_results(done):
  results = json.loads((done / 'results.json').read_text())
  for encoder in ('trained', 'embedder', 'random', 'raw'):
    for task in ('linear', 'knn', 'few_shot'):
      prefix = f'{encoder}/digits/{task}/accuracy'
      low, value, high = (results[prefix + s] for s in ('_low', '', '_high'))
      assert 0.05 < low <= value <= high <= 1
  assert results['embedder/digits/linear/accuracy'] > 0.75
  assert results['trained/digits/linear/accuracy_count'] == 100
  table = report.table([done, done])
  assert '8 labels an image' in table and 'raw pixels' in table
  assert table.count('trained encoder') == 2
  assert table.count('raw pixels') == 1


def test_run_again_does_nothing(done, tiny_config, caplog):
  before = snapshot(done)
  stages.run(tiny_config, done)
  assert snapshot(done) == before


@pytest.mark.parametrize(
  ('field', 'value', 'folder_named'),
  [
    ('seed', 1, 'clusters'),
    ('embed.image_size', 35, 'embeddings'),
    ('data.split', 'train', 'embeddings'),
    ('cluster.num_centers', 65, 'clusters'),
    ('model.embedding_dim', 16, 'checkpoints'),
    ('loss.scale', 10.0, 'checkpoints'),
    ('train.steps', 13, 'checkpoints'),
    ('train.ema_decay', 0.99, 'checkpoints'),
    ('train.max_loss_ratio', 2.0, 'checkpoints'),
  ],
)
def test_another_config_is_refused(
  done, tiny_config, field, value, folder_named
):
  before = snapshot(done)
  tiny_config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.UserError, match=f'{folder_named}.*{field}'):
    stages.run(tiny_config, done)
  assert snapshot(done) == before


def test_a_mistake_that_made_nothing_leaves_nothing(tiny_config, tmp_path):
  mistaken = tiny_config.copy_and_resolve_references()
  mistaken.data.source = 'folder'
  mistaken.data.path = str(tmp_path / 'photos')
  with pytest.raises(errors.UserError, match='no such folder'):
    stages.run(mistaken, tmp_path / 'run', ('embed',))
  stages.run(tiny_config, tmp_path / 'run', ('embed',))
  found = manifests.load(tmp_path / 'run/embeddings')
  assert found.complete and found.config['data.source'] == 'embedded'


def test_how_a_run_is_executed_may_change(done, tiny_config):
  tiny_config.mesh.fsdp = 1
  tiny_config.train.log_every_steps = 7
  tiny_config.train.checkpoint_every_steps = 3
  tiny_config.train.accumulate_steps = 2
  tiny_config.train.max_skipped_steps = 1
  tiny_config.embed.batch_size = 8
  tiny_config.model.remat = 'full'
  tiny_config.model.scan_layers = True
  tiny_config.loss.chunk_megabytes = 1.0
  tiny_config.evaluate.batch_size = 128
  tiny_config.evaluate.every_steps = 4
  before = snapshot(done)
  stages.run(tiny_config, done)
  assert snapshot(done) == before


# By stage, the sections of which its files depend on every field, and others.
_DEPENDS = {
  'embed': ({'embed'}, {'data.caption_key'}),
  'cluster': ({'cluster', 'seed'}, set()),
  'train': (
    {'model', 'loss', 'optimizer', 'seed'},
    {'data.crop_area', 'data.flip', 'train.steps', 'train.epochs',
     'train.min_steps', 'train.batch_size', 'train.ema_decay',
     'train.max_loss_ratio'},
  ),
  'evaluate': (
    {'optimizer', 'evaluate', 'lit', 'seed'},
    {'data.caption_key', 'data.crop_area', 'data.flip'},
  ),
}  # fmt: skip
_IMAGES = {f'data.{f}' for f in ('source', 'path', 'data_dir', 'split')}
_FREE = {
  'embed.batch_size', 'cluster.path',
  'model.remat', 'model.scan_layers', 'loss.chunk_megabytes',
  'evaluate.batch_size', 'evaluate.every_steps',
}  # fmt: skip


@pytest.mark.parametrize('stage', stages.STAGES)
def test_every_field_is_one_that_a_stage_depends_on_or_not(tiny_config, stage):
  sections, others = _DEPENDS[stage]
  if stage != 'cluster':
    others = others | _IMAGES | {'data.image_key'}
  every = set(config_fields.NAMES) - {'evaluate.datasets'}
  every |= {
    f'evaluate.datasets.digits.{name}'
    for name in tiny_config.evaluate.datasets.digits
  }
  for field in sorted(every):
    section = field.partition('.')[0]
    depends = field in others or (section in sections and field not in _FREE)
    assert (field in stages.fields(tiny_config, stage)) == depends, field


@pytest.mark.parametrize(
  ('fields', 'matter'),
  [
    ({}, False),
    ({'model.variant': 'resnet50'}, True),
    ({'model.drop_path': 0.1}, True),
    ({'loss.negatives': 'partial_fc', 'loss.sample_rate': 0.1}, True),
    ({'loss.negatives': 'partial_fc', 'loss.sample_rate': 1.0}, False),
    ({'loss.negatives': 'uniform', 'loss.sample_rate': 0.1}, False),
  ],
)
def test_parts_of_a_batch_matter_only_where_they_differ(
  tiny_config, fields, matter
):
  tiny_config.update_from_flattened_dict(fields)
  before = stages.fields(tiny_config, 'train')
  tiny_config.train.accumulate_steps = 4
  assert (stages.fields(tiny_config, 'train') != before) == matter


def test_a_manifest_without_a_field_is_refused(copy, tiny_config):
  path = copy / 'checkpoints/manifest.json'
  made = json.loads(path.read_text())
  del made['config']['train.ema_decay']
  path.write_text(json.dumps(made))
  with pytest.raises(errors.UserError, match='did not note train.ema_decay'):
    stages.run(tiny_config, copy)


def test_other_tasks_are_scored_anew(copy, tiny_config):
  tiny_config.evaluate.tasks = ('knn',)
  stages.run(tiny_config, copy)
  results = json.loads((copy / 'results.json').read_text())
  assert {k.split('/')[2] for k in results} == {'knn'}


def test_clusters_of_another_run_are_read_in_place(done, tiny_config, tmp_path):
  before = snapshot(done)
  tiny_config.cluster.path = str(done)
  tiny_config.loss.num_positives = 1
  tiny_config.evaluate.tasks = ('knn',)
  workdir = tmp_path / 'one_label'
  stages.run(tiny_config, workdir)
  assert snapshot(done) == before
  assert not (workdir / 'embeddings').exists()
  assert not (workdir / 'clusters').exists()
  assert (workdir / 'results.json').exists()

  tiny_config.cluster.num_centers = 65
  with pytest.raises(errors.UserError, match='cluster.num_centers=64'):
    stages.run(tiny_config, tmp_path / 'other')
  tiny_config.cluster.num_centers = 0  # Those that are there.
  tiny_config.cluster.rule = 'pursuit'
  with pytest.raises(errors.UserError, match="cluster.rule='nearest'"):
    stages.run(tiny_config, tmp_path / 'other')
  tiny_config.cluster.rule = 'nearest'
  stages.run(tiny_config, tmp_path / 'chosen', ('embed', 'cluster'))


def test_changed_clusters_are_refused(copy, tiny_config, tmp_path):
  path = copy / 'clusters/labels_00000.npy'
  files.write_npy(path, np.load(path) + 1)
  tiny_config.cluster.path = str(copy)
  with pytest.raises(errors.UserError, match='labels_00000.npy.*changed'):
    stages.run(tiny_config, tmp_path / 'other')


def test_stages_need_the_ones_before(tiny_config, tmp_path):
  for chosen, missing, needed in (
    (['cluster'], 'embed', 'embed,cluster'),
    (['train', 'embed'], 'cluster', 'embed,cluster,train'),
    (['train'], 'embed and cluster', 'embed,cluster,train'),
    (['evaluate', 'train', 'cluster'], 'embed', ','.join(stages.STAGES)),
  ):
    with pytest.raises(
      errors.UserError, match=f': {missing} must.*use --stages={needed},'
    ):
      stages.run(tiny_config, tmp_path, chosen)
  assert not (tmp_path / 'embeddings').exists()
  with pytest.raises(errors.UserError, match="'trian' is unknown"):
    stages.run(tiny_config, tmp_path, ['trian'])


def test_broken_manifest_is_refused(copy, tiny_config):
  (copy / 'clusters/manifest.json').write_text('{"stage": ')
  with pytest.raises(errors.UserError, match='manifest.json.*JSON'):
    stages.run(tiny_config, copy)
  (copy / 'clusters/manifest.json').write_text('[1]')
  with pytest.raises(errors.UserError, match='not a manifest'):
    stages.run(tiny_config, copy)


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('train.batch_size', 12, 'not divisible by the 8 devices'),
    ('mesh.fsdp', 3, 'do not fit 8 devices'),
    ('cluster.num_centers', 301, '301 centers need as many rows'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(
  tiny_config, tmp_path, field, value, says
):
  tiny_config.update_from_flattened_dict({field: value})
  with pytest.raises(errors.UserError, match=says):
    stages.run(tiny_config, tmp_path / 'run')


def test_folder_in_use_is_refused(tiny_config, tmp_path):
  with open(tmp_path / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(errors.UserError, match='in use by another process'):
      stages.run(tiny_config, tmp_path)


def test_folder_that_cannot_be_written_is_refused(tiny_config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='--workdir.*cannot be written'):
    stages.run(tiny_config, tmp_path / 'file' / 'run')


def test_retrained_encoder_is_scored_anew(copy, tiny_config):
  before = json.loads((copy / 'results.json').read_text())
  shutil.rmtree(copy / 'checkpoints')
  tiny_config.data.crop_area = (0.9, 1.0)  # The same program.
  tiny_config.evaluate.tasks = ('linear', 'knn', 'few_shot')
  stages.run(tiny_config, copy)
  after = json.loads((copy / 'results.json').read_text())
  name = 'digits/knn/accuracy'
  assert after[f'raw/{name}'] == before[f'raw/{name}']
  assert {k: v for k, v in after.items() if k.startswith('trained')} != {
    k: v for k, v in before.items() if k.startswith('trained')
  }


@pytest.mark.slow
def test_lost_results_are_scored_again(copy, tiny_config):
  before = (copy / 'results.json').read_bytes()
  (copy / 'results.json').unlink()
  stages.run(tiny_config, copy, ['evaluate'])
  assert (copy / 'results.json').read_bytes() == before


@pytest.mark.parametrize('stage', ['embeddings', 'clusters', 'checkpoints'])
def test_files_without_a_manifest_are_not_reused(copy, tiny_config, stage):
  (copy / stage / 'manifest.json').unlink()
  with pytest.raises(errors.UserError, match=f'{stage} has files but no'):
    stages.run(tiny_config, copy)


@pytest.mark.parametrize(
  'name',
  ['img_emb/img_emb_00001.npy', 'metadata/metadata_00001.parquet'],
)
@pytest.mark.parametrize('lost', [True, False])
def test_lost_or_changed_embeddings_are_refused(copy, tiny_config, name, lost):
  shutil.rmtree(copy / 'clusters')
  shutil.rmtree(copy / 'checkpoints')
  path = copy / 'embeddings' / name
  other = path.with_name(path.name.replace('00001', '00000'))
  if lost:
    path.unlink()
  else:
    shutil.copy(other, path)
  with pytest.raises(errors.UserError, match=f'{path.name}.*changed'):
    stages.run(tiny_config, copy)


def test_clusters_are_the_same_on_every_mesh(done, tiny_config, tmp_path):
  tiny_config.mesh.data, tiny_config.mesh.fsdp = 1, 8
  stages.run(tiny_config, tmp_path, ['embed', 'cluster'])
  for name in ('labels_00000.npy', 'labels_00002.npy'):
    np.testing.assert_array_equal(
      np.load(tmp_path / 'clusters' / name), np.load(done / 'clusters' / name)
    )


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('label_key', 'foo', 'evaluate.datasets.digits.label_key=foo'),
    ('test_split', 'nope', 'evaluate.datasets.digits: .*nope'),
  ],
)
def test_evaluation_data_is_checked_first(
  tiny_config, tmp_path, field, value, says
):
  tiny_config.evaluate.datasets.digits[field] = value
  with pytest.raises(errors.UserError, match=says):
    stages.run(tiny_config, tmp_path)
  assert not (tmp_path / 'embeddings').exists()


def test_unknown_model_is_refused_first(tiny_config, tmp_path):
  tiny_config.model.variant = 'Huge/16'
  with pytest.raises(errors.UserError, match='model.variant'):
    stages.run(tiny_config, tmp_path)
  assert not (tmp_path / 'embeddings').exists()


def test_damaged_checkpoint_is_named(copy, tiny_config):
  data = [p for p in (copy / 'checkpoints/12').rglob('*') if p.is_file()]
  for path in data:
    if path.stat().st_size > 1_000:
      path.write_bytes(b'junk')
  shutil.rmtree(copy / 'evaluation')
  with pytest.raises(errors.UserError, match='checkpoints/12.*delete it'):
    stages.run(tiny_config, copy)


def test_clustering_goes_on_where_it_was_killed(
  tiny_config, tmp_path, monkeypatch
):
  stages.run(tiny_config, tmp_path / 'whole', ('embed', 'cluster'))
  write = files.write_npz

  def killed(path, **arrays):
    write(path, **arrays)
    if len(arrays['fit_objective']) == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(files, 'write_npz', killed)
    with pytest.raises(KeyboardInterrupt):
      stages.run(tiny_config, tmp_path / 'killed', ('embed', 'cluster'))
  folder = tmp_path / 'killed/clusters'
  assert not (folder / 'centers.npy').exists()
  assert (folder / 'unfinished.npz').exists()
  stages.run(tiny_config, tmp_path / 'killed', ('embed', 'cluster'))
  assert not (folder / 'unfinished.npz').exists()
  for path in (tmp_path / 'whole/clusters').glob('*.*'):
    if path.name != 'manifest.json':
      assert path.read_bytes() == (folder / path.name).read_bytes(), path


@pytest.mark.slow
def test_released_weights_embed_and_start_training(tiny_config, tmp_path):
  clip = pathlib.Path(__file__).parent / 'goldens/clip_with_text'
  start = tmp_path / 'start'
  tiny_config.model.pooling = 'class_token'
  model = models.make(tiny_config.model)
  images = np.zeros((1, 28, 28, 3), np.uint8)
  export.to_huggingface(start, model, model.init(jax.random.key(0), images))
  tiny_config.embed.embedder = 'huggingface'
  tiny_config.embed.path = str(clip)
  tiny_config.embed.batch_size = 4
  tiny_config.model.init_from = str(start)
  tiny_config.train.steps = 2
  tiny_config.evaluate.tasks = ('knn',)
  workdir = tmp_path / 'run'
  stages.run(tiny_config, workdir)
  assert np.load(workdir / 'clusters/centers.npy').shape == (64, 6)
  results = json.loads((workdir / 'results.json').read_text())
  assert results['embedder/digits/knn/accuracy'] > 0.15  # Random weights.
  made = json.loads((workdir / 'checkpoints/manifest.json').read_text())
  assert made['notes']['init_from'] == str(start)
  before = snapshot(workdir)
  stages.run(tiny_config, workdir)
  assert snapshot(workdir) == before
