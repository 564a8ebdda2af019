"""Images a second of the embedder and of transformers with torch, on CPUs.

  pip install -r requirements-bench.txt
  python benchmarks/embed.py [--rounds=5] [--images=64] [--batch_size=32]

CLIP's ViT-B/32 at 224 pixels with random weights in float32, from uint8 images
in memory to unit rows of the projected output. Both run in one process on all
of its cores and take turns; the ratio is of the two times of the same round,
and its median is shown with the smallest and largest.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
import transformers

from mlcd_jax.huggingface import configs
from mlcd_jax.huggingface import embedder


def main() -> None:
  """Takes turns, prints the ratio."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--batch_size', type=int, default=32)
  args = parser.parse_args()
  torch.manual_seed(0)
  model = transformers.CLIPVisionModelWithProjection(
    transformers.CLIPVisionConfig()
  ).eval()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    ours = embedder.Huggingface(
      folder, image_size=0, batch_size=args.batch_size, dtype='float32'
    )
  images = np.random.default_rng(0).integers(
    0, 256, (args.images, 224, 224, 3), np.uint8
  )
  methods = {
    'mlcd_jax': lambda: ours(images),
    'transformers': lambda: _theirs(model, images, args.batch_size),
  }
  rows = {name: method() for name, method in methods.items()}  # Compiles.
  error = np.abs(rows['mlcd_jax'] - rows['transformers']).max()
  seconds = {name: [] for name in methods}
  for _ in range(args.rounds):
    for name, method in methods.items():
      start = time.perf_counter()
      method()
      seconds[name].append(time.perf_counter() - start)
  for name, times in seconds.items():
    print(f'{name}: {args.images / statistics.median(times):.1f} images/s')
  ratios = [b / a for a, b in zip(*seconds.values())]
  print(
    f'times as fast: {statistics.median(ratios):.2f} '
    f'({min(ratios):.2f}-{max(ratios):.2f}); rows differ by {error:.1e}'
  )


@torch.inference_mode()
def _theirs(model, images: np.ndarray, batch_size: int) -> np.ndarray:
  """Unit rows by transformers."""
  mean, std = (torch.tensor(v)[:, None, None] for v in configs.PIXELS['clip'])
  rows = []
  for i in range(0, len(images), batch_size):
    pixels = torch.from_numpy(images[i : i + batch_size]).permute(0, 3, 1, 2)
    out = model((pixels.float() / 255 - mean) / std).image_embeds
    rows.append(torch.nn.functional.normalize(out).numpy())
  return np.concatenate(rows)


if __name__ == '__main__':
  main()
