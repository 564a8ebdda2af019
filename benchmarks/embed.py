"""Images per second of the Hugging Face embedder and of transformers.

  pip install -r requirements-bench.txt
  python benchmarks/embed.py [--batch=64] [--dtype=float32] [--rounds=5]

A CLIP ViT-B/32 with random weights, saved and loaded by both; from uint8
images of 224 pixels to unit rows of its projection, the same rows up to
rounding, which is checked. transformers runs with scaled_dot_product_attention
under inference_mode, eager and compiled. Decoding and resizing come before and
are not measured; scaling to floats and the mean are. Each is a process of its
own that waits while the others take their turns; ratios are of neighbours.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np

_SIDE = 224
_METHODS = ('mlcd_jax', 'eager', 'compiled')


def _make_folder(folder: str) -> None:
  """Saves OpenAI's ViT-B/32 sizes with random weights."""
  import torch
  import transformers

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
  import torch
  import transformers

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


def _ours(folder: str, dtype: str, batch: int):
  from mlcd_jax.embed import encoder

  return encoder.Huggingface(
    folder, image_size=0, batch_size=batch, dtype=dtype
  )


def _serve(connection, name: str, folder: str, args) -> None:
  """Sends the rows, and then for every message the seconds of a call."""
  images = np.random.default_rng(0).integers(
    0, 256, (args.batch, _SIDE, _SIDE, 3), np.uint8
  )
  if name == 'mlcd_jax':
    encode = _ours(folder, args.dtype, args.batch)
  else:
    encode = _peer(folder, args.dtype, compiled=name == 'compiled')
  encode(images)  # Compiles.
  connection.send(encode(images))
  while connection.recv():
    start = time.perf_counter()
    encode(images)
    connection.send(time.perf_counter() - start)


def main() -> None:
  """Prints medians and the ratios of neighbours."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  spawn = multiprocessing.get_context('spawn')
  ends, rows = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    _make_folder(folder)
    for name in _METHODS:
      ends[name], theirs = spawn.Pipe()
      spawn.Process(
        target=_serve, args=(theirs, name, folder, args), daemon=True
      ).start()
      rows[name] = ends[name].recv()
  seconds = {name: [] for name in _METHODS}
  for _ in range(args.rounds):
    for name, end in ends.items():
      end.send(True)
      seconds[name].append(end.recv())
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
          k: round(args.batch / statistics.median(v), 1)
          for k, v in seconds.items()
        },
        'ratio_to_the_best': round(statistics.median(ratios), 2),
        'ratios': [round(r, 2) for r in ratios],
        'least_cosine': float(
          np.sum(rows['mlcd_jax'] * rows['eager'], axis=1).min()
        ),
        'cores': os.cpu_count(),
      }
    )
  )


if __name__ == '__main__':
  main()
