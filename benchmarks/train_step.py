"""One training step against PyTorch's, on the same model, loss and data.

  pip install -r requirements-bench.txt
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train_step.py \
    --batch=16,64 --dtype=bfloat16,float32

The peer is written as one would in PyTorch: scaled_dot_product_attention,
fused AdamW, eager and torch.compile, and a classifier that samples as PartialFC
does. They take turns, so that all see the same machine, and ratios are of
neighbours. In a turn only the second step is timed: in training a step follows
its like, and finds the memory that it freed. Each case has one line of JSON on
stdout and one for people on stderr.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
# Huge pages for PyTorch's tensors: 3 % faster.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from mlcd_jax import sharding
from mlcd_jax.config import presets
from mlcd_jax.train import step as step_lib

_SCALE, _MARGIN = 64.0, 0.3


class _Block(nn.Module):
  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.up = nn.Linear(width, 4 * width)
    self.down = nn.Linear(4 * width, width)

  def forward(self, x):
    batch, tokens, width = x.shape
    qkv = self.qkv(self.norm1(x)).view(
      batch, tokens, 3, self.heads, width // self.heads
    )
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
    return x + self.down(F.gelu(self.up(self.norm2(x))))


class _ViT(nn.Module):
  def __init__(self, *, patch=32, width=768, depth=12, heads=12, dim=512):
    super().__init__()
    tokens = (224 // patch) ** 2 + 1
    self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
    self.token = nn.Parameter(torch.randn(width) * 0.02)
    self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
    self.pre, self.post = nn.LayerNorm(width), nn.LayerNorm(width)
    self.blocks = nn.Sequential(*[_Block(width, heads) for _ in range(depth)])
    self.projection = nn.Linear(width, dim, bias=False)

  def forward(self, images):
    x = self.patches(images).flatten(2).transpose(1, 2)
    token = self.token.expand(len(x), 1, -1).to(x.dtype)
    x = self.pre(torch.cat([token, x], 1) + self.positions)
    return self.projection(self.post(self.blocks(x)[:, 0]))


def torch_step(args, images, labels):
  """Returns a function that takes one step and returns the loss."""
  torch.manual_seed(0)
  model = _ViT()
  weight = nn.Parameter(torch.randn(args.classes, 512) * 0.01)
  optimizer = torch.optim.AdamW(
    [*model.parameters(), weight],
    lr=1e-4,
    weight_decay=0.2,
    betas=(0.9, 0.98),
    fused=True,
  )
  parameters = [*model.parameters(), weight]
  encode = torch.compile(model) if args.compiled else model
  mean = torch.tensor([0.481, 0.458, 0.408])[:, None, None]
  std = torch.tensor([0.269, 0.261, 0.276])[:, None, None]
  images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  labels = torch.from_numpy(labels).long()
  count = int(args.rate * args.classes)

  def step():
    optimizer.zero_grad(set_to_none=True)
    bf16 = args.dtype == 'bfloat16'
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
      z = F.normalize(encode((images.float() / 255 - mean) / std).float())
      positives = labels.unique()
      chance = torch.rand(args.classes)
      chance[positives] = 2.0
      chosen = torch.topk(chance, max(count, len(positives)))[1].sort()[0]
      own = torch.searchsorted(chosen, labels)
      cosines = F.linear(z, F.normalize(weight[chosen])).float()
      p = _SCALE * (cosines.gather(1, own) - _MARGIN)
      mask = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, own, True)
      n = (_SCALE * cosines).masked_fill(mask, -torch.inf)
      loss = (
        F.softplus(torch.logsumexp(-p, 1)) + F.softplus(torch.logsumexp(n, 1))
      ).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()
    return loss.item()

  return step


def jax_step(args, images, labels):
  """Returns the same step as `torch_step`, by mlcd_jax.train.step."""
  config = presets.make('laion400m', variant='B/32', embedding_dim=512)
  config.model.dtype = args.dtype
  config.model.scan_layers = args.scan
  config.train.batch_size = args.batch
  config.loss.sample_rate = args.rate
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 0
  program = step_lib.Program(
    config=config,
    num_classes=args.classes,
    steps=1_000,
    mesh=sharding.make_mesh(),
  )
  batch = sharding.put_batch(
    program.mesh,
    {
      'image': images,
      'labels': labels,
      'weight': np.ones(args.batch, np.float32),
    },
  )
  state = program.init()

  def step():
    nonlocal state
    state, metrics = program.step(state, batch)
    return float(metrics['train/loss'])

  return step


def measure(args) -> dict[str, object]:
  """Measures one case: medians, and the ratios of neighbouring steps."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (args.batch, 224, 224, 3), np.uint8)
  labels = np.stack(
    [rng.permutation(args.classes)[:8] for _ in range(args.batch)]
  ).astype(np.int32)
  torch.compiler.reset()  # Or a second batch size would get dynamic shapes.
  steps = {'mlcd_jax': jax_step(args, images, labels)}
  for peer in args.peers.split(','):
    args.compiled = peer == 'compiled'
    steps[peer] = torch_step(argparse.Namespace(**vars(args)), images, labels)
  losses = {name: [step(), step()][-1] for name, step in steps.items()}
  seconds = {name: [] for name in steps}
  processor = {name: [] for name in steps}  # Of all cores.
  for _ in range(args.steps):
    for name, step in steps.items():
      step()
      start = time.perf_counter(), time.process_time()
      step()
      seconds[name].append(time.perf_counter() - start[0])
      processor[name].append(time.process_time() - start[1])
  peers = [name for name in steps if name != 'mlcd_jax']
  ratios = [
    min(seconds[peer][i] for peer in peers) / seconds['mlcd_jax'][i]
    for i in range(args.steps)
  ]
  median = lambda values: {  # noqa: E731
    k: statistics.median(v) for k, v in values.items()
  }
  return {
    'batch': args.batch,
    'dtype': args.dtype,
    'seconds': median(seconds),
    'processor_seconds': median(processor),
    'ratio_to_the_best': statistics.median(ratios),
    'ratios': ratios,
    'losses_after_two_steps': losses,
    'cores': os.cpu_count(),
  }


def main() -> None:
  """Prints every case of --batch and --dtype."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--batch', default='16')
  parser.add_argument('--classes', type=int, default=100_000)
  parser.add_argument('--rate', type=float, default=0.1)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--scan', action='store_true')
  parser.add_argument('--peers', default='eager,compiled')
  args = parser.parse_args()
  cases = itertools.product(args.batch.split(','), args.dtype.split(','))
  for batch, dtype in cases:
    case = argparse.Namespace(**vars(args) | {'batch': int(batch)})
    case.dtype = dtype
    found = measure(case)
    print(json.dumps(found), flush=True)
    seconds = ', '.join(f'{k} {v:.2f} s' for k, v in found['seconds'].items())
    ratio = found['ratio_to_the_best']
    print(
      f'{dtype}, batch {batch}: {seconds}; {ratio:.2f} times as fast as the '
      f'best peer ({min(found["ratios"]):.2f} to {max(found["ratios"]):.2f})',
      file=sys.stderr,
    )


if __name__ == '__main__':
  main()
