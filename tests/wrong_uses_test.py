"""Wrong uses: each ends with exit 2 and one line that names the way out."""

import json
import pathlib
import shutil

from absl import flags
import numpy as np
import pytest

from mlcd_jax import main
from mlcd_jax import stages
from mlcd_jax.config import fields
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors
from tests import commands

_BASE = ('--config=configs/quickstart.py', '--workdir=x')


@pytest.fixture(name='command')
def fixture_command(monkeypatch, capsys, tmp_path):
  """(arguments) -> exit code and lines on stderr, in this process."""
  monkeypatch.chdir(commands.ROOT)

  class Exited(BaseException):
    pass

  def exits(code):
    raise Exited(code)

  monkeypatch.setattr(cli.os, '_exit', exits)
  monkeypatch.setattr(cli.terminal, 'log_to_stderr', lambda: None)

  def command(*arguments):
    arguments = [
      a.replace('--workdir=x', f'--workdir={tmp_path}') for a in arguments
    ]
    monkeypatch.setattr(cli.sys, 'argv', ['main', *arguments])
    flags.FLAGS.unparse_flags()
    for flag in ('config', 'workdir', 'stages', 'coordinator_address'):
      flags.FLAGS[flag].unparse()
    for flag in ('num_processes', 'process_id', 'init_timeout'):
      flags.FLAGS[flag].unparse()
    # Fields that an earlier call added.
    for flag in [f for f in flags.FLAGS if f.startswith('config.')]:
      delattr(flags.FLAGS, flag)
    try:
      cli.run(main.main, required=('config',), fields=fields.NAMES)
    except Exited as e:
      return e.args[0], capsys.readouterr().err.splitlines()
    except SystemExit as e:
      return e.code, capsys.readouterr().err.splitlines()
    finally:
      flags.FLAGS.mark_as_parsed()

  return command


def field(assignment, *says):
  return ((*_BASE, f'--config.{assignment}'), says)


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    # Flags.
    ((), ('--config is missing', 'configs/vit_b16.py')),
    (('configs/vit_b16.py',), ('write --config=configs/vit_b16.py',)),
    (('--config.train.steps=3',), ('--config is missing', 'vit_b16.py')),
    ((_BASE[0], '--workdir='), ('--workdir is empty', 'runs/')),
    ((_BASE[0], '--workdir=gs://b/r'), ('--workdir=gs://b/r', 'mounted')),
    ((_BASE[0], '--workdir=s3://b/r'), ('--workdir=s3://b/r', 'mounted')),
    ((_BASE[0], '--workdir=file:///r'), ('--workdir=file:///r', 'a folder')),
    (('--config=configs/none.py', '--workdir=x'), ('--config', 'quickstart')),
    (('--config=vit_b16',), ('did you mean configs/vit_b16.py?',)),
    (('--config', 'configs/vit_b16'), ('did you mean configs/vit_b16.py?',)),
    (('--config=vit_b61.py:x',), ('did you mean configs/vit_b16.py:x?',)),
    (('--config=~/none.py',), (f'--config={pathlib.Path.home()}/none.py',)),
    (('--config=configs',), ('--config=configs: not a Python file', '.py')),
    (('--config=Makefile',), ('--config=Makefile: not a Python file', '.py')),
    (('--config=configs/vit_b16.py:x', '--workdir=x'), ('--config', 'laion')),
    (('--config=configs/quickstart.py:x', '--workdir=x'), ("'x'; use lit",)),
    ((*_BASE, '--stage=train'), ('stage',)),
    ((*_BASE, '--steps=3'), ("'steps'", '--config.train.steps')),
    ((*_BASE, '--train.batch_size=3'), ('--config.train.batch_size',)),
    ((*_BASE, '--preset=lit'), ("'preset'", '--help')),
    ((*_BASE, '--stages=cluster'), ('use --stages=embed,cluster',)),
    ((*_BASE, '--stages=train'), ('use --stages=embed,cluster,train',)),
    (
      (*_BASE, '--stages=embed,train'),
      (': cluster must', 'use --stages=embed,cluster,train'),
    ),
    ((*_BASE, '--stages=evaluate'), ('=embed,cluster,train,evaluate',)),
    ((*_BASE, '--stages=trian'), ('--stages', 'train')),
    ((*_BASE, '--stages='), ('--stages', 'train')),
    ((*_BASE, 'train'), ("'train' is not a flag",)),
    ((*_BASE, '--num_processes=2'), ('--num_processes', 'all three')),
    ((*_BASE, '--process_id=x'), ('--process_id=x', 'int()')),
    ((*_BASE, '--init_timeout=0'), ('--init_timeout=0', 'at least 1')),
    # Fields that do not exist, and values of another type.
    field('lr=1', "no field 'lr'", '--help'),
    field('batch_size=1', "'batch_size'", '--config.train.batch_size'),
    field('data.datasets=1', "'datasets'", '--config.evaluate.datasets'),
    field('train.num_centers=1', '--config.cluster.num_centers'),
    field('optimizer.decay=1', '--config.optimizer.weight_decay'),
    field('train.stepz=1', 'stepz', '"steps"'),
    field('trian.steps=1', 'trian', '"train"'),
    field('train.steps=many', 'train.steps', 'int'),
    field('train.steps=1e3', 'train.steps', 'int'),
    field('train.batch_size=1.5', 'train.batch_size', 'int'),
    field('loss.scale=big', 'loss.scale', 'float'),
    field('data.flip=perhaps', 'data.flip', 'bool'),
    field("data.crop_area='(0.5'", 'data.crop_area'),
    # Choices.
    field('data.source=tar', "data.source='tar'", 'webdataset'),
    field('embed.embedder=clip', "embed.embedder='clip'", 'hog'),
    field('model.pooling=max', "model.pooling='max'", 'average'),
    field('model.dtype=float16', "model.dtype='float16'", 'bfloat16'),
    field('model.remat=all', "model.remat='all'", 'full'),
    field('model.variant=Huge/16', 'model.variant', 'SIZE/PATCH'),
    field('model.variant=B', 'model.variant', 'SIZE/PATCH'),
    field('loss.name=ce', "loss.name='ce'", 'softmax'),
    field('loss.label_choice=any', 'loss.label_choice', 'nearest'),
    field('loss.margin_type=arc', 'loss.margin_type', 'arcface'),
    field('loss.negatives=all', 'loss.negatives', 'uniform'),
    field('optimizer.schedule=step', 'optimizer.schedule', 'cosine'),
    field('optimizer.head_update=lazy', 'optimizer.head_update', 'sparse'),
    field("evaluate.tasks=('probe',)", 'evaluate.tasks', 'linear'),
    field('evaluate.tasks=linear,probe', 'evaluate.tasks', 'all'),
    field('evaluate.datasets.digits.metric=f1', 'digits.metric', 'roc_auc'),
    field(
      'evaluate.datasets.digits.attributes_key=x',
      'evaluate.datasets.digits',
      'attributes_key=x',
    ),
    field('evaluate.named=petz', 'evaluate.named', 'food101'),
    field('evaluate.named=aircraft', 'datasets.aircraft', 'by hand'),
    field('evaluate.finetune_epochs=-1', 'finetune_epochs=-1', '0 to'),
    (
      (
        *_BASE,
        '--config.evaluate.tasks=finetune',
        '--config.evaluate.finetune_batch_size=12',
      ),
      ('finetune_batch_size=12',),
    ),
    field('evaluate.finetune_layer_decay=2', 'layer_decay=2', '0 to 1'),
    field('evaluate.every_steps=-1', 'every_steps=-1', '0 to'),
    field('lit.loss=mse', "lit.loss='mse'", 'sigmoid'),
    field('lit.dtype=float16', "lit.dtype='float16'", 'bfloat16'),
    field('lit.steps=-1', 'lit.steps=-1', '0 to'),
    field('lit.batch_size=0', 'lit.batch_size=0', '1 to'),
    field('lit.learning_rate=-1', 'lit.learning_rate=-1', '0 to'),
    field('lit.width=0', 'lit.width=0', '1 to'),
    field('lit.depth=0', 'lit.depth=0', '1 to'),
    field('lit.context=2', 'lit.context=2', '3 to'),
    field('evaluate.encoder=/no/such', 'evaluate.encoder=/no/such', 'folder'),
    field(
      'evaluate.datasets.digits.source=x',
      'evaluate.datasets.digits.source',
      'embedded',
    ),
    (
      (
        *_BASE,
        '--config.evaluate.tasks=zero_shot',
        '--config.evaluate.datasets.digits.prompts=cats',
      ),
      ('evaluate.datasets.digits.prompts=cats', 'there are'),
    ),
    (
      (
        *_BASE,
        '--config.evaluate.tasks=retrieval',
        '--config.data.caption_key=text',
      ),
      ('data.caption_key=text', 'lit.steps=0'),
    ),
    # Ranges.
    field('seed=-1', 'seed=-1', '0 to'),
    field('data.num_workers=-1', 'data.num_workers=-1', '0 to'),
    field('data.max_bad_fraction=1.5', 'data.max_bad_fraction', '0 to 1'),
    field('data.crop_area=(0.9,0.1)', 'data.crop_area', 'low <= high'),
    field('data.crop_area=(0.1,0.2,0.3)', 'data.crop_area', '(low, high)'),
    field('embed.image_size=-1', 'embed.image_size=-1', '0 to'),
    field('embed.batch_size=0', 'embed.batch_size=0', '1 to'),
    field('embed.text_weight=2', 'embed.text_weight=2', '0 to 1'),
    field('cluster.repair_iterations=0', 'repair_iterations=0', '1 to'),
    field('embed.shard_rows=0', 'embed.shard_rows=0', '1 to'),
    field('cluster.num_centers=-1', 'cluster.num_centers=-1', '0 to'),
    field('cluster.iterations=0', 'cluster.iterations=0', '1 to'),
    field('cluster.method=on', 'cluster.method', 'auto'),
    field('cluster.tolerance=2', 'cluster.tolerance=2', '0 to 1'),
    field('cluster.num_labels=0', 'cluster.num_labels=0', '1 to'),
    field('model.image_size=0', 'model.image_size=0', '1 to'),
    field('model.image_size=30', 'model', '30'),
    field('model.embedding_dim=0', 'model.embedding_dim=0', '1 to'),
    field('model.drop_path=1', 'model.drop_path=1', '0 to'),
    field('loss.num_positives=0', 'loss.num_positives=0', '1 to'),
    field('loss.scale=0', 'loss.scale=0', 'to'),
    field('loss.scale=nan', 'loss.scale=nan', 'to'),
    field('loss.sample_rate=0', 'loss.sample_rate=0', 'to 1'),
    field('loss.sample_rate=1.1', 'loss.sample_rate=1.1', 'to 1'),
    field('loss.margin=-1', 'loss.margin=-1', '0 to 2'),
    field('loss.interclass_filter=2', 'loss.interclass_filter=2', '0 to 1'),
    field('optimizer.learning_rate=-1', 'optimizer.learning_rate', '0 to'),
    field('optimizer.b1=1', 'optimizer.b1=1', '0 to'),
    field('train.batch_size=0', 'train.batch_size=0', '1 to'),
    field('train.ema_decay=2', 'train.ema_decay=2', '0 to 1'),
    field('train.keep_checkpoints=0', 'train.keep_checkpoints=0', '1 to'),
    field('train.max_skipped_steps=-1', 'max_skipped_steps=-1', '0 to'),
    field('train.max_loss_ratio=-1', 'train.max_loss_ratio=-1', '0 to'),
    field(
      'train.max_loss_ratio=0.5', 'train.max_loss_ratio=0.5', 'more than 1'
    ),
    field('train.keep_best=loss', 'train.keep_best=loss', 'train/loss'),
    field('train.best_is=first', "train.best_is='first'", 'lowest, highest'),
    field('mesh.data=0', 'mesh.data=0', '-1'),
    field('mesh.slices=0', 'mesh.slices=0', 'at least 1'),
    # Fields that do not go together.
    field('train.steps=0', 'train.epochs', 'set one of them'),
    field('train.epochs=1', 'train.steps', 'set one of them'),
    field('loss.num_positives=11', 'cluster.num_labels=10'),
    field('cluster.num_centers=9', 'cluster.num_labels=10'),
    field('loss.name=softmax', 'set loss.num_positives=1'),
    field('cluster.levels=(4,)', 'cluster.levels=(4,)', 'k1 * k2'),
    field('cluster.levels=(7,7)', 'cluster.levels=(7, 7)', 'num_centers'),
    field('cluster.levels=(0,0)', 'cluster.levels=(0, 0)', 'k1 * k2'),
    field('embed.embedder=precomputed', 'embed.path is empty', 'URL'),
    field('embed.embedder=checkpoint', 'embed.path is empty', 'workdir'),
    field('embed.text_weight=0.5', 'embed.text_weight=0.5', 'precomputed'),
    field('train.batch_size=12', 'train.batch_size=12', '8 devices'),
    field('evaluate.batch_size=12', 'evaluate.batch_size=12', '8 devices'),
    field('train.accumulate_steps=3', 'train.accumulate_steps=3'),
    field('mesh.fsdp=3', 'mesh.fsdp=3', '8 devices'),
    field('mesh.slices=3', 'mesh.slices=3', 'mesh.data'),
    # Files that are not there.
    field('cluster.path=/no/such', 'cluster.path=/no/such', 'workdir'),
    field('data.path=letters', 'data.path', 'digits'),
    field('data.split=trian', 'data.split=trian', 'train'),
    field('data.source=folder', 'data.path'),
    field('data.bad_keys=/no/such', 'data.bad_keys', '/no/such'),
  ],
  ids=lambda x: ' '.join(x[2:] or x) if x and x[0] == _BASE[0] else '',
)
def test_wrong_use(command, arguments, says):
  code, lines = command(*arguments)
  assert code == 2, lines
  assert lines[-1].startswith('error: ')
  assert not any('Traceback' in line for line in lines)
  for text in says:
    assert text in lines[-1]


@pytest.fixture(name='clustered', scope='module')
def fixture_clustered(tmp_path_factory):
  return tmp_path_factory.mktemp('clustered')


@pytest.fixture(name='copy')
def fixture_copy(clustered, tiny_config, tmp_path):
  """A copy of a run that is clustered, not trained."""
  stages.run(tiny_config, clustered, ('embed', 'cluster'))
  return shutil.copytree(clustered, tmp_path / 'copy')


def rewrite(path, **changes):
  content = json.loads(path.read_text())
  content.update(changes)
  path.write_text(json.dumps(content))


def other_embeddings(copy):
  path = copy / 'embeddings/img_emb/img_emb_00000.npy'
  np.save(path, np.load(path)[::-1])
  shutil.rmtree(copy / 'clusters')


def pickled(path):
  class Evil:
    def __reduce__(self):
      return (pathlib.Path.touch, (path.with_name('owned'),))

  np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (other_embeddings, 'img_emb_00000.npy.*delete'),
    (lambda c: rewrite(c / 'embeddings/manifest.json', result={'a': 1}),
     'other embeddings than.*--workdir'),
    (lambda c: (c / 'clusters/manifest.json').write_text('{'),
     'manifest.json.*delete'),
    (lambda c: (c / 'clusters/manifest.json').write_text('{"stage": 1}'),
     'manifest.json.*not a manifest.*delete'),
    (lambda c: (c / 'clusters/labels_00001.npy').unlink(),
     'labels_00001.npy.*missing.*delete'),
    (lambda c: pickled(c / 'clusters/labels_00001.npy'),
     'labels_00001.npy.*changed.*delete'),
    (lambda c: (c / 'embeddings/manifest.json').unlink(),
     'embed.*|manifest.json.*delete'),
    (lambda c: (c / 'checkpoints').mkdir() or
     (c / 'checkpoints/x').write_text(''), 'checkpoints has files.*delete'),
  ],
)  # fmt: skip
def test_wrong_files(copy, tiny_config, spoil, says):
  spoil(copy)
  with pytest.raises(errors.UserError, match=says):
    stages.run(tiny_config, copy, ('cluster', 'train'))
  assert not list(copy.rglob('owned'))
