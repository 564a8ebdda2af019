"""Tiny random models of every family in transformers, and what they say.

  python tests/weights/oracles.py

writes tests/goldens anew: folders as transformers and OpenCLIP write them, each
with golden.npz. Needs torch, transformers and open_clip_torch; the tests of
goldens do not.
"""

import json
import pathlib
import shutil

import numpy as np

GOLDENS = pathlib.Path(__file__).parent.parent / 'goldens'

SIZES = ((21, 21), (28, 28), (14, 28))  # Trained at the first.

_BASE = dict(num_hidden_layers=2, image_size=21, patch_size=7)
_CLIP = dict(hidden_size=20, num_attention_heads=4, intermediate_size=28)
_SIGLIP = dict(hidden_size=18, num_attention_heads=2, intermediate_size=28)
_MLCD = dict(hidden_size=24, num_attention_heads=2, intermediate_size=28)
_DINOV2 = dict(hidden_size=14, num_attention_heads=2, mlp_ratio=2)
_TEXT = dict(
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  vocab_size=11,
  max_position_embeddings=4,
)

# Name -> (class, config class, config, how it is saved).
MODELS = {
  'clip': ('CLIPVisionModel', 'CLIPVisionConfig', _CLIP, {}),
  'clip_bf16': (
    'CLIPVisionModelWithProjection',
    'CLIPVisionConfig',
    _CLIP | dict(hidden_act='gelu', projection_dim=6),
    dict(bf16=True, max_shard_size='3KB'),
  ),
  'clip_with_text': (
    'CLIPModel',
    'CLIPConfig',
    dict(vision_config=_BASE | _CLIP, text_config=_TEXT, projection_dim=6),
    {},
  ),
  'mlcd': ('MLCDVisionModel', 'MLCDVisionConfig', _MLCD, {}),
  'siglip': ('SiglipVisionModel', 'SiglipVisionConfig', _SIGLIP, {}),
  'siglip_with_text': (
    'SiglipModel',
    'SiglipConfig',
    dict(
      vision_config=_BASE | _SIGLIP,
      text_config=_TEXT | dict(projection_size=18),
    ),
    dict(bf16=True),
  ),
  'dinov2': ('Dinov2Model', 'Dinov2Config', _DINOV2, {}),
  'dinov2_swiglu': (
    'Dinov2Model',
    'Dinov2Config',
    _DINOV2 | dict(use_swiglu_ffn=True),
    {},
  ),
  'dinov2_registers': (
    'Dinov2WithRegistersModel',
    'Dinov2WithRegistersConfig',
    _DINOV2 | dict(num_register_tokens=3),
    dict(bf16=True),
  ),
}


def make(name: str, seed: int = 0, **fields):
  """One of MODELS with random weights, none of them zero or one."""
  import torch
  import transformers

  class_name, config_name, config, saving = MODELS[name]
  torch.manual_seed(seed)
  if 'vision_config' not in config:
    config = _BASE | config | fields
  model = getattr(transformers, class_name)(
    getattr(transformers, config_name)(**config)
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
      if saving.get('bf16'):
        parameter.copy_(parameter.to(torch.bfloat16))
  return model


def save(name: str, model, folder: pathlib.Path) -> None:
  """Saves a model as its entry in MODELS says."""
  import torch

  saving = dict(MODELS[name][3])
  if saving.pop('bf16', False):
    model = model.to(torch.bfloat16)
  model.save_pretrained(folder, **saving)
  model.to(torch.float32)


# As in OpenCLIP's own: a whole model, whose text tower is not to be mixed up.
OPEN_CLIP = dict(
  embed_dim=6,
  quick_gelu=True,
  vision_cfg=dict(
    image_size=21, layers=2, width=20, head_width=5, mlp_ratio=1.4, patch_size=7
  ),
  text_cfg=dict(context_length=4, vocab_size=11, width=8, heads=2, layers=1),
)


def make_open_clip(seed: int = 0, **vision):
  """A model of OpenCLIP's and its config, with random weights."""
  import open_clip
  import torch

  torch.manual_seed(seed)
  config = OPEN_CLIP | dict(vision_cfg=OPEN_CLIP['vision_cfg'] | vision)
  model = open_clip.CLIP(**config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model, config


def save_open_clip(model, config, folder: pathlib.Path) -> None:
  """Saves as OpenCLIP's `push_to_hf_hub` does."""
  from safetensors import torch as safetensors_torch

  folder.mkdir(parents=True, exist_ok=True)
  safetensors_torch.save_file(
    model.state_dict(), folder / 'open_clip_model.safetensors'
  )
  pixels = dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25])
  content = dict(model_cfg=config, preprocess_cfg=pixels)
  (folder / 'open_clip_config.json').write_text(json.dumps(content))


def outputs_open_clip(model, images: np.ndarray) -> dict[str, np.ndarray]:
  """What OpenCLIP's vision tower makes of uint8 images."""
  import torch

  pixels = (images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.25]
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  tower = model.visual
  with torch.no_grad():
    found = {'image_embeds': tower(pixels)}
    projection, tower.proj = tower.proj, None
    found['pooler_output'] = tower(pixels)
    tower.proj = projection
  return {k: v.numpy() for k, v in found.items()}


def outputs(name: str, model, images: np.ndarray) -> dict[str, np.ndarray]:
  """What a model makes of uint8 images, by the names it has there."""
  import torch

  from mlcd_jax.weights import configs

  mean, std = configs.PIXELS[name.partition('_')[0]]
  pixels = (images.astype(np.float64) / 255 - mean) / std
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  whole = name.endswith('with_text')
  tower = model.vision_model if whole else model
  interpolate = {}
  if name.startswith(('clip', 'siglip')):
    interpolate['interpolate_pos_encoding'] = True
  with torch.no_grad():
    out = tower(pixels, **interpolate)
    found = {'last_hidden_state': out.last_hidden_state}
    for field in ('pooler_output', 'image_embeds'):
      if getattr(out, field, None) is not None:
        found[field] = getattr(out, field)
    if whole and name.startswith('clip'):
      found['image_embeds'] = model.visual_projection(out.pooler_output)
  return {k: v.numpy() for k, v in found.items()}


RESNET = dict(embedding_size=4, hidden_sizes=[16, 32], depths=[2, 1])


def make_resnet(seed: int = 0, **fields):
  """A ResNetModel with random weights and running averages."""
  import torch
  import transformers

  torch.manual_seed(seed)
  model = transformers.ResNetModel(
    transformers.ResNetConfig(**(RESNET | fields))
  ).eval()
  for tensor in model.state_dict().values():
    if tensor.is_floating_point():
      tensor.add_(0.2 * torch.rand_like(tensor))
  return model


def outputs_resnet(model, pixels: np.ndarray, *, training: bool):
  """The last map [B, L, D] and pooled [B, D] of floats [B, H, W, 3]."""
  import torch

  with torch.no_grad():
    out = model.train(training)(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  last = out.last_hidden_state.flatten(2).transpose(1, 2)
  return {
    'hidden': last.numpy(),
    'pooled': out.pooler_output.flatten(1).numpy(),
  }


def images(size: tuple[int, int], seed: int = 0) -> np.ndarray:
  """Random uint8 images."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (2, *size, 3), np.uint8)


# Name -> (processor, its fields).
PROCESSORS = {
  'clip': (
    'CLIPImageProcessorPil',
    dict(size={'shortest_edge': 24}, crop_size={'height': 24, 'width': 24}),
  ),
  'siglip': ('SiglipImageProcessorPil', dict(size={'height': 24, 'width': 24})),
  'dinov2': (
    'BitImageProcessorPil',
    dict(
      size={'shortest_edge': 31},
      crop_size={'height': 24, 'width': 24},
      image_mean=[0.485, 0.456, 0.406],
      image_std=[0.229, 0.224, 0.225],
    ),
  ),
}
PHOTO_SIZES = ((37, 53), (80, 33), (12, 19), (24, 24), (31, 500))


def processor(name: str):
  """One of PROCESSORS."""
  import transformers

  class_name, fields = PROCESSORS[name]
  return getattr(transformers, class_name)(**fields)


def write_resnet(folder: pathlib.Path) -> None:
  """What a ResNet makes of pixels, and its averages after a training step."""
  model = make_resnet()
  pixels = np.random.default_rng(0).normal(size=(3, 18, 21, 3))
  golden = {'pixels': pixels.astype(np.float32)}
  for case, training in (('before', False), ('after', True)):
    out = outputs_resnet(model, golden['pixels'], training=training)
    golden |= {f'{case}/{key}': value for key, value in out.items()}
    for key, value in model.state_dict().items():
      golden[f'{case}/{key}'] = value.numpy().copy()
  folder.mkdir()
  np.savez_compressed(folder / 'golden.npz', **golden)


def main() -> None:
  """Writes the goldens anew."""
  shutil.rmtree(GOLDENS, ignore_errors=True)
  for name in MODELS:
    model = make(name)
    save(name, model, GOLDENS / name)
    golden = {}
    for i, size in enumerate(SIZES):
      golden[f'{i}/images'] = images(size, seed=i)
      for key, value in outputs(name, model, golden[f'{i}/images']).items():
        golden[f'{i}/{key}'] = value
    np.savez_compressed(GOLDENS / name / 'golden.npz', **golden)
  model, config = make_open_clip()
  save_open_clip(model, config, GOLDENS / 'open_clip')
  golden = {}
  for i in range(len(SIZES)):  # OpenCLIP takes its own size only.
    golden[f'{i}/images'] = images(SIZES[0], seed=i)
    for key, value in outputs_open_clip(model, golden[f'{i}/images']).items():
      golden[f'{i}/{key}'] = value
  np.savez_compressed(GOLDENS / 'open_clip/golden.npz', **golden)
  write_resnet(GOLDENS / 'resnet')
  for name in PROCESSORS:
    folder = GOLDENS / f'preprocessing_{name}'
    process = processor(name)
    process.save_pretrained(folder)
    golden = {}
    for i, size in enumerate(PHOTO_SIZES):
      photo = images(size, seed=i)[0]
      golden[f'{i}/image'] = photo
      pixels = process(photo, return_tensors='np')['pixel_values'][0]
      golden[f'{i}/pixels'] = pixels.transpose(1, 2, 0)
    np.savez_compressed(folder / 'golden.npz', **golden)


if __name__ == '__main__':
  main()
