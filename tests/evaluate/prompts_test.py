"""Sentences of classes: CLIP's own, and those of a file."""

import json

import pytest

from mlcd_jax import config as config_lib
from mlcd_jax.evaluate import datasets
from mlcd_jax.evaluate import prompts
from mlcd_jax.runtime import errors


def sentences(name, class_names=(), num_classes=2):
  return prompts.sentences(name, class_names, num_classes, field='prompts')


def test_the_papers_data_sets_have_theirs():
  config = config_lib.default()
  config.evaluate.named = ('paper',)
  found = datasets.with_named(config).evaluate.datasets
  assert found.food101.prompts == 'food101'
  assert found.imagenet.prompts == 'imagenet'
  assert not found.voc2007.prompts  # Has several classes an image.
  assert {n for n, d in found.items() if not d.prompts} == {
    'birdsnap',
    'hateful_memes',
    'kinetics700',
    'ucf101',
    'voc2007',
  }


def test_clips_own_imagenet():
  found = sentences('imagenet', (), 1_000)
  assert {len(texts) for texts in found} == {80}
  assert found[0][0] == 'a bad photo of a tench.'
  found = sentences('imagenet_robustness', (), 1_000)
  assert found[999][0] == 'itap of a toilet paper.' and len(found[0]) == 7


def test_names_of_the_data_set_where_the_list_has_none():
  found = sentences('food101', ('apple_pie', '/b/ba_by/back_ribs'))
  assert found == [
    ['a photo of apple pie, a type of food.'],
    ['a photo of ba by back ribs, a type of food.'],
  ]


def test_a_file_of_ones_own(tmp_path):
  path = tmp_path / 'my.json'
  entry = {'classes': ['cat', 'dog'], 'templates': ['a {c}', '{c}, my {c}']}
  path.write_text(json.dumps({'pets': entry}))
  assert sentences(f'{path}:pets') == [
    ['a cat', 'cat, my cat'],
    ['a dog', 'dog, my dog'],
  ]
  path.write_text(json.dumps({'pets': {'classes': ['cat', 'dog']}}))
  with pytest.raises(errors.UserError, match='needs "templates" with {c}'):
    sentences(f'{path}:pets')
  with pytest.raises(errors.UserError, match='no such entry; there are pets'):
    sentences(f'{path}:cars')
  path.write_text('{')
  with pytest.raises(errors.UserError, match='my.json:pets: cannot be read'):
    sentences(f'{path}:pets')


def test_what_does_not_fit_is_refused():
  with pytest.raises(errors.UserError, match='prompts=cats: no such.*digits'):
    sentences('cats')
  with pytest.raises(errors.UserError, match='10 class names for 3 classes'):
    sentences('digits', (), 3)
  with pytest.raises(errors.UserError, match='0 class names for 2 classes'):
    sentences('cifar10')
