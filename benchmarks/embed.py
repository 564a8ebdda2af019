"""Images per second of the Hugging Face embedder and of transformers.

  pip install -r requirements-bench.txt
  python benchmarks/embed.py [--batch=64] [--dtype=float32] [--rounds=5]

A CLIP ViT-B/32 with random weights, saved and loaded by both; from uint8
images of 224 pixels to unit rows of its projection, the same rows up to
rounding, which is checked. transformers runs with scaled_dot_product_attention
under inference_mode, eager and compiled. All take turns, and ratios are of
neighbours.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
import transformers

from mlcd_jax.huggingface import embedder

_SIDE = 224


def _make_folder(folder: str) -> None:
  """Saves OpenAI's ViT-B/32 sizes with random weights."""
  torch.manual_seed(0)
  config = transformers.CLIPVisionConfig(
    hidden_size=768,
    intermediate_size=3_072,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=32,
    image_size=_SIDE,
    projection_dim=512,
  )
  transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
  transformers.CLIPImageProcessorPil(
    size={'shortest_edge': _SIDE}, crop_size=_SIDE
  ).save_pretrained(folder)


def _peer(folder: str, dtype: str, *, compiled: bool):
  """The model of transformers as a function of uint8 images."""
  model = transformers.CLIPVisionModelWithProjection.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation='sdpa'
  ).eval()
  run = torch.compile(model) if compiled else model
  processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
  mean = torch.tensor(processor.image_mean)[:, None, None]
  std = torch.tensor(processor.image_std)[:, None, None]

  @torch.inference_mode()
  def encode(images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    pixels = ((pixels - mean) / std).to(model.dtype)
    rows = run(pixel_values=pixels).image_embeds.float()
    return torch.nn.functional.normalize(rows).numpy()

  return encode


def main() -> None:
  """Prints medians and the ratios of neighbours."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  images = np.random.default_rng(0).integers(
    0, 256, (args.batch, _SIDE, _SIDE, 3), np.uint8
  )
  with tempfile.TemporaryDirectory() as folder:
    _make_folder(folder)
    methods = {
      'mlcd_jax': embedder.Huggingface(
        folder, image_size=0, batch_size=args.batch, dtype=args.dtype
      ),
      'eager': _peer(folder, args.dtype, compiled=False),
      'compiled': _peer(folder, args.dtype, compiled=True),
    }
  rows = {name: [f(images), f(images)][-1] for name, f in methods.items()}
  seconds = {name: [] for name in methods}
  for _ in range(args.rounds):
    for name, encode in methods.items():
      start = time.perf_counter()
      encode(images)
      seconds[name].append(time.perf_counter() - start)
  ratios = [
    min(eager, compiled) / ours
    for ours, eager, compiled in zip(*seconds.values(), strict=True)
  ]
  print(
    json.dumps(
      {
        'batch': args.batch,
        'dtype': args.dtype,
        'images_per_second': {
          k: args.batch / statistics.median(v) for k, v in seconds.items()
        },
        'ratio_to_the_best': statistics.median(ratios),
        'ratios': ratios,
        'least_cosine': float(
          np.sum(rows['mlcd_jax'] * rows['eager'], axis=1).min()
        ),
        'cores': os.cpu_count(),
      }
    )
  )


if __name__ == '__main__':
  main()
