"""Fields of the configs: applied as transformers and OpenCLIP do, or refused.

What is expected was checked against transformers 5.23 and OpenCLIP 3.3
(`live_test.py`, `open_clip_live_test.py`).
"""

import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from mlcd_jax.runtime import errors
from mlcd_jax.weights import configs
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import pinned as pinned_lib
from mlcd_jax.weights import preprocessing
from mlcd_jax.weights import text

GOLDENS = pathlib.Path(__file__).parent.parent / 'goldens'
PROCESSORS = sorted(p.parent.name for p in GOLDENS.glob('*/preprocessor*'))


def write(folder, name, content):
  (folder / name).write_text(json.dumps(content))


def golden_config(name):
  return json.loads((GOLDENS / name / 'config.json').read_text())


def assert_prepares_as(prepare, name):
  golden = np.load(GOLDENS / name / 'golden.npz')
  for case in sorted({key.partition('/')[0] for key in golden}):
    pixels = prepare(golden[f'{case}/image']) / 255
    np.testing.assert_allclose(
      (pixels - prepare.mean) / prepare.std, golden[f'{case}/pixels'], atol=1e-5
    )


def test_features_are_those_of_vision_config_dict(tmp_path):
  folder = shutil.copytree(GOLDENS / 'clip_bf16', tmp_path / 'clip')
  right = golden_config('clip_bf16')
  wrong = right | dict(hidden_act='quick_gelu', layer_norm_eps=0.1)
  write(
    folder,
    'config.json',
    dict(model_type='clip', vision_config=wrong, vision_config_dict=right),
  )
  model, variables = huggingface.from_huggingface(folder)
  golden = np.load(GOLDENS / 'clip_bf16/golden.npz')
  found = jax.jit(model.apply)(variables, golden['0/images'])['embedding']
  expected = golden['0/image_embeds']
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
  ('config', 'patch_size', 'activation'),
  [
    ({'vision_config': {'patch_size': 14}}, 14, 'quick_gelu'),
    ({'vision_config_dict': {'patch_size': 14}}, 14, 'quick_gelu'),
    ({'vision_config': None}, 32, 'quick_gelu'),
    # What the second leaves out is the default, not what the first has.
    (
      {
        'vision_config': {'patch_size': 16, 'hidden_act': 'gelu'},
        'vision_config_dict': {'patch_size': 14},
      },
      14,
      'quick_gelu',
    ),
    ({'vision_config': {'patch_size': 16}, 'vision_config_dict': {}}, 32, ''),
    (
      {'vision_config': {'patch_size': 16}, 'vision_config_dict': None},
      16,
      '',
    ),
    # A whole model's own fields are not those of its towers.
    ({'patch_size': 14, 'hidden_act': 'gelu'}, 32, 'quick_gelu'),
  ],
)
def test_towers_of_whole_models(tmp_path, config, patch_size, activation):
  write(tmp_path, 'config.json', {'model_type': 'clip'} | config)
  found = configs.read(tmp_path)[1]
  assert found['patch_size'] == patch_size
  assert found['hidden_act'] == (activation or 'quick_gelu')


def test_siglip_has_no_second_config(tmp_path, caplog):
  content = dict(
    model_type='siglip',
    vision_config={'patch_size': 14},
    vision_config_dict={'patch_size': 7},
  )
  write(tmp_path, 'config.json', content)
  assert configs.read(tmp_path)[1]['patch_size'] == 14
  assert 'without effect: vision_config_dict' in caplog.text


@pytest.mark.parametrize('given', ['text_config', 'text_config_dict', 'both'])
def test_text_towers_of_whole_models(tmp_path, given, caplog):
  folder = shutil.copytree(GOLDENS / 'clip_with_text', tmp_path / 'clip')
  config = golden_config('clip_with_text')
  tower = config.pop('text_config') | dict(hidden_act='gelu')
  if given == 'both':
    config['text_config'] = tower | dict(hidden_act='quick_gelu')
  write(
    folder,
    'config.json',
    config | {'text_config_dict' if given == 'both' else given: tower},
  )
  assert text.is_there(folder)
  assert text.load(folder)[0].activation == 'gelu'
  said = 'text_config_dict is used, which says otherwise' in caplog.text
  assert said == (given == 'both')


@pytest.mark.parametrize(
  ('name', 'fields', 'says'),
  [
    ('dinov2', {'qkv_bias': False}, 'qkv_bias=False is not supported'),
    ('siglip', {'vision_use_head': False}, 'vision_use_head=False'),
    ('mlcd', {'num_key_value_groups': 2}, 'num_key_value_groups=2'),
    ('mlcd', {'rope_parameters': {'rope_theta': 1e5}}, 'rope_theta=100000.0'),
    ('mlcd', {'rope_parameters': None, 'rope_theta': 1e5}, 'rope_theta'),
    ('mlcd', {'rope_scaling': {'type': 'linear'}}, "rope_type='linear'"),
    ('mlcd', {'head_dim': 8}, 'head_dim=8'),
    ('clip', {'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ('clip', {'quantization_config': {'bits': 8}}, 'quantization_config'),
    ('clip', {'per_layer_config': {'1': {}}}, 'per_layer_config'),
    ('clip', {'architectures': 3}, 'architectures=3'),
    ('siglip_with_text', {'quantization_config': {'a': 1}}, 'quantization'),
  ],
)
def test_other_values_are_refused_by_name(tmp_path, name, fields, says):
  write(tmp_path, 'config.json', golden_config(name) | fields)
  with pytest.raises(errors.UserError, match=f'config.json: {says}'):
    configs.read(tmp_path)


@pytest.mark.parametrize('name', ['clip', 'siglip', 'dinov2', 'clip_with_text'])
def test_what_has_no_effect_passes_and_the_unknown_is_said(
  tmp_path, name, caplog
):
  config = golden_config(name)
  write(tmp_path, 'config.json', config)
  expected = configs.read(tmp_path)
  assert not caplog.records
  harmless = dict(
    attention_dropout=0.5,
    initializer_range=1.0,
    torch_dtype='float16',
    pruned_heads={},
    id2label={'0': 'a'},
    top_k=50,
  )
  write(tmp_path, 'config.json', config | harmless | {'use_magic': False})
  assert configs.read(tmp_path) == expected
  assert not caplog.records
  write(tmp_path, 'config.json', config | {'use_magic': True})
  assert configs.read(tmp_path) == expected
  assert caplog.messages == [
    f'{tmp_path}/config.json: not known, so without effect: use_magic'
  ]


@pytest.mark.parametrize('name', PROCESSORS)
def test_preprocessing_saved_with_a_processor(name, tmp_path):
  family = name.partition('_')[2]
  saved = json.loads((GOLDENS / name / preprocessing.NAME).read_text())
  content = {'processor_class': 'AnyProcessor', 'image_processor': saved}
  write(tmp_path, 'processor_config.json', content)
  assert_prepares_as(preprocessing.read(tmp_path, family, 21), name)
  # It comes before the older file; and a video's is another matter.
  other = saved | dict(image_mean=[0.1, 0.2, 0.3], resample=2)
  write(tmp_path, preprocessing.NAME, other)
  write(tmp_path, 'video_preprocessor_config.json', {'size': 3})
  assert_prepares_as(preprocessing.read(tmp_path, family, 21), name)


@pytest.mark.parametrize('older', [{}, {'image_processor': None}])
def test_processors_without_an_image_processor(older, tmp_path):
  name = 'preprocessing_dinov2'
  shutil.copy(GOLDENS / name / preprocessing.NAME, tmp_path)
  write(tmp_path, 'processor_config.json', {'processor_class': 'A'} | older)
  assert_prepares_as(preprocessing.read(tmp_path, 'dinov2', 21), name)


def test_a_processors_file_is_pinned(tmp_path):
  folder = shutil.copytree(GOLDENS / 'clip', tmp_path / 'clip')
  size = dict(size=24, crop_size=24)
  write(folder, 'processor_config.json', {'image_processor': size})
  pinned = pinned_lib.pin(str(folder), 'embed.path')
  assert 'processor_config.json' in pinned['weights']
  pinned_lib.check(pinned, 'embed.path')
  write(folder, 'processor_config.json', {'image_processor': size | {'a': 0}})
  with pytest.raises(errors.UserError, match='the files are not those'):
    pinned_lib.check(pinned, 'embed.path')


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    # Defaults are those of the class.
    (dict(image_processor_type='CLIPImageProcessor'), (224, 224, 3, 0.4814)),
    (dict(image_processor_type='BitImageProcessorFast'), (224, 224, 3, 0.4814)),
    (dict(image_processor_type='SiglipImageProcessor'), (224, 0, 3, 0.5)),
    (dict(image_processor_type='ViTImageProcessorPil'), (224, 0, 2, 0.5)),
    (dict(feature_extractor_type='CLIPFeatureExtractor'), (224, 224, 3, 0.48)),
    # Every way to write a size.
    (dict(size=28, crop_size=[24, 24]), (24, 28, 3, 0.4814)),
    (dict(size={'shortest_edge': 28}, crop_size=24), (24, 28, 3, 0.4814)),
    (dict(size=[24, 24], do_center_crop=False), (24, 0, 3, 0.4814)),
    (
      dict(size=24, default_to_square=True, do_center_crop=False),
      (24, 0, 3, 0.4814),
    ),
    (
      dict(size={'height': 24, 'width': 24}, crop_size=24, resample=1),
      (24, 0, 1, 0.4814),
    ),
    (
      dict(size={'shortest_edge': 24, 'longest_edge': None}, crop_size=24),
      (24, 24, 3, 0.4814),
    ),
    (
      dict(size=24, crop_size=24, do_pad=False, do_convert_rgb=None, x=None),
      (24, 24, 3, 0.4814),
    ),
  ],
)
def test_fields_of_preprocessing(tmp_path, fields, expected):
  write(tmp_path, preprocessing.NAME, fields)
  found = preprocessing.read(tmp_path, 'clip', 21)
  values = (found.image_size, found.shorter_side, found.resample)
  assert values == expected[:3]
  assert abs(found.mean[0] - expected[3]) < 2e-3


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    (dict(image_processor_type='FlavaImageProcessor'), 'Flava.*only CLIPImage'),
    (dict(do_pad=True), 'do_pad=True'),
    (dict(pad_size={'height': 9, 'width': 9}), 'pad_size'),
    (dict(size_divisor=32), 'size_divisor=32'),
    (dict(use_square_size=True), 'use_square_size=True'),
    (dict(do_flip_channel_order=True), 'do_flip_channel_order=True'),
    (dict(crop_pct=0.9), 'crop_pct=0.9'),
    (dict(do_rescale=None), 'do_rescale=None'),
    (dict(do_center_crop=None), 'no square images'),
    (dict(size=None), 'size=None'),
    (dict(size={'longest_edge': 24}), 'longest_edge'),
    (dict(size={'shortest_edge': 24, 'longest_edge': 30}), 'longest_edge'),
    (dict(size={'max_height': 24, 'max_width': 24}), 'max_height'),
    (dict(size={'height': 28, 'width': 28}), 'before crop_size'),
    (dict(crop_size={'shortest_edge': 24}), 'no square images'),
    (dict(resample='bicubic'), r"resample='bicubic' is none of 0 \(nearest\)"),
  ],
)
def test_preprocessing_is_refused_by_name(tmp_path, fields, says):
  content = {'image_processor': dict(size=24, crop_size=24) | fields}
  write(tmp_path, 'processor_config.json', content)
  with pytest.raises(
    errors.UserError, match=f'processor_config.json: .*{says}'
  ):
    preprocessing.read(tmp_path, 'clip', 21)


def open_clip_folder(folder, change=None, **pixels):
  path = GOLDENS / 'open_clip/open_clip_config.json'
  content = json.loads(path.read_text())
  content['model_cfg'] |= change or {}
  content['preprocess_cfg'] = pixels
  write(folder, path.name, content)
  return folder


@pytest.mark.parametrize(
  ('fields', 'shorter', 'resample', 'mean'),
  [
    ({}, 21, 3, 0.4814),
    (dict(mean=0.5, std=0.25), 21, 3, 0.5),
    (dict(interpolation='bilinear'), 21, 2, 0.4814),
    (dict(interpolation='random', resize_mode=None), 21, 3, 0.4814),
    (dict(resize_mode='squash', fill_color=3, size=9), 0, 3, 0.4814),
  ],
)
def test_open_clips_preprocessing(tmp_path, fields, shorter, resample, mean):
  # OpenCLIP itself does not read the other file.
  write(tmp_path, preprocessing.NAME, dict(size=3, crop_size=3))
  open_clip_folder(tmp_path, **fields)
  found = preprocessing.read(tmp_path, 'open_clip', 21)
  assert (found.shorter_side, found.resample) == (shorter, resample)
  assert abs(found.mean[0] - mean) < 2e-3 and found.image_size == 21


def test_open_clip_rounds_where_its_crop_begins(tmp_path):
  prepare = preprocessing.read(open_clip_folder(tmp_path), 'open_clip', 21)
  pixels = np.random.default_rng(0).integers(0, 256, (21, 24, 3), np.uint8)
  # 1.5 pixels on either side: torchvision begins at 2, transformers at 1.
  np.testing.assert_array_equal(prepare(pixels), pixels[:, 2:23])
  (tmp_path / 'open_clip_config.json').unlink()
  prepare = preprocessing.read(tmp_path, 'clip', 21)
  np.testing.assert_array_equal(prepare(pixels), pixels[:, 1:22])


@pytest.mark.parametrize(
  ('change', 'fields', 'says'),
  [
    ({}, dict(resize_mode='longest'), "resize_mode='longest'"),
    ({}, dict(interpolation='nearest'), "interpolation='nearest'"),
    ({}, dict(mode='L'), "mode='L'"),
    ({}, dict(mean=['a', 'b', 'c']), 'not as OpenCLIP writes it'),
    ({'vision_cfg': {'no_ln_pre': True}}, {}, 'no_ln_pre=True'),
    ({'vision_cfg': {'norm_kwargs': {'eps': 1e-6}}}, {}, 'norm_kwargs'),
    ({'vision_cfg': {'pool_type': 'avg'}}, {}, "pool_type='avg'"),
    ({'vision_cfg': {'qk_norm': True}}, {}, 'qk_norm=True'),
    ({'hf_model': 'x'}, {}, "hf_model='x'"),
  ],
)
def test_open_clip_is_refused_by_name(tmp_path, change, fields, says):
  open_clip_folder(tmp_path, change, **fields)
  with pytest.raises(errors.UserError, match=f'open_clip_config.json: {says}'):
    preprocessing.read(tmp_path, 'open_clip', 21)


@pytest.mark.parametrize('shape', [(1, 40_000, 3), (40_000, 1, 3)])
def test_long_pictures_are_resized_where_the_crop_is(tmp_path, shape):
  write(tmp_path, preprocessing.NAME, dict(size=24, crop_size=24))
  prepare = preprocessing.read(tmp_path, 'clip', 24)
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  middle = slice(19_950, 20_050)
  part = pixels[:, middle] if shape[0] == 1 else pixels[middle]
  whole = np.asarray(
    Image.fromarray(part).resize((24 * part.shape[1], 24 * part.shape[0]), 3)
  )
  top, left = (whole.shape[0] - 24) // 2, (whole.shape[1] - 24) // 2
  expected = whole[top : top + 24, left : left + 24].astype(int)
  assert np.abs(prepare(pixels) - expected).max() <= 2
