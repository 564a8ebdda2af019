"""Images per CPU-second of the input pipeline and of its peers.

  pip install -r requirements-bench.txt
  python benchmarks/input_pipeline.py [--rounds=3] [--images=1500]

From JPEGs in tars to shuffled batches of random-resized crops, uint8 at 224
pixels. `bare` is OpenCV's decode and crop in a plain loop over bytes in
memory, the limit of any pipeline around it. The peers crop with Pillow, as
torchvision does, and have no worker processes, which would cost them more.
Each measurement is a process of its own on one core, which is what `per core`
means: two threads of one core would slow each other down. The methods take
turns, and the median of the rounds is shown. A peer that is not installed is
left out.
"""

import argparse
from collections.abc import Iterator
import importlib.util
import io
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from PIL import Image

_SIZES = {'341x256': (341, 256), '500x375': (500, 375)}
_NUM_TARS = 16
_BATCH = 128
_SIDE = 224
_AREA = (0.7, 1.0)
_ASPECT_RATIO = (0.8, 1.25)


def main() -> None:
  """Takes turns, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--images', type=int, default=1_500)
  parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    method, folder = args.measure
    print(json.dumps(_measure(_METHODS[method](folder), args.images)))
    return
  methods = [m for m in _METHODS if m in ('bare', 'mlcd_jax') or _installed(m)]
  with tempfile.TemporaryDirectory() as root:
    rates = {}
    for name, size in _SIZES.items():
      folder = pathlib.Path(root, name)
      _make_tars(folder, size)
      for _ in range(args.rounds):
        for method in methods:
          rate = _in_process(method, folder, args.images)
          rates.setdefault((name, method), []).append(rate)
  _print_table(rates, methods)


def _installed(method: str) -> bool:
  needed = {'torch': ['torch'], 'webdataset': ['torch', 'webdataset']}[method]
  return all(importlib.util.find_spec(name) for name in needed)


def _in_process(method: str, folder: pathlib.Path, images: int) -> float:
  done = subprocess.run(
    [
      sys.executable,
      __file__,
      f'--images={images}',
      '--measure',
      method,
      str(folder),
    ],
    stdout=subprocess.PIPE,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def _print_table(rates, methods) -> None:
  print('| images per CPU-second | ' + ' | '.join(_SIZES) + ' |')
  print('| --- |' + ' --- |' * len(_SIZES))
  for method in methods:
    cells = []
    for size in _SIZES:
      rate = statistics.median(rates[size, method])
      ratios = [a / b for a, b in zip(rates[size, method], rates[size, 'bare'])]
      cells.append(f'{rate:,.0f} ({statistics.median(ratios):.0%} of bare)')
    print(f'| {method} | ' + ' | '.join(cells) + ' |')


def _measure(batches, images: int) -> float:
  """Images per second of CPU time, of all threads, after a warm-up."""
  for _ in range(4):
    next(batches)
  count, start = 0, time.process_time()
  while count < images:
    count += len(next(batches))
  return count / (time.process_time() - start)


def _bare(folder: str):
  """OpenCV alone; one image each, that nothing is batched."""
  import cv2

  cv2.setNumThreads(1)
  images = [image for _, image in _read_tars(folder)]
  rng = np.random.default_rng(0)
  while True:
    for image in images:
      pixels = cv2.imdecode(
        np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB
      )
      left, top, width, height = _crop(rng, *pixels.shape[1::-1])
      crop = pixels[top : top + height, left : left + width]
      crop = cv2.resize(crop, (_SIDE, _SIDE))
      yield [cv2.flip(crop, 1) if rng.random() < 0.5 else crop]


def _mlcd_jax(folder: str):
  """The project's own pipeline, with labels."""
  from mlcd_jax import config as config_lib
  from mlcd_jax.data import pipelines
  from mlcd_jax.data import sources

  data = config_lib.default().data
  data.source, data.path = 'webdataset', folder
  source = sources.make(data)
  rows = np.arange(len(source))
  for batch in pipelines.train_batches(
    source,
    rows,
    np.tile(rows[:, None], (1, 10)).astype(np.int32),
    num_positives=8,
    batch_size=_BATCH,
    image_size=_SIDE,
    crop_area=_AREA,
    flip=True,
    seed=0,
  ):
    yield batch['image']


def _torch(folder: str):
  """A map-style data set of bytes in memory in torch's DataLoader."""
  import torch

  torch.set_num_threads(1)
  images = [image for _, image in _read_tars(folder)]

  class Images(torch.utils.data.Dataset):
    def __len__(self):
      return len(images)

    def __getitem__(self, index):
      return _pillow_crop(Image.open(io.BytesIO(images[index])))

  while True:
    yield from torch.utils.data.DataLoader(
      Images(), _BATCH, shuffle=True, drop_last=True
    )


def _webdataset(folder: str):
  """Tars in order with a shuffle buffer, as webdataset's users have it."""
  import torch
  import webdataset

  torch.set_num_threads(1)
  tars = sorted(str(path) for path in pathlib.Path(folder).glob('*.tar'))
  dataset = (
    webdataset.WebDataset(tars, shardshuffle=False)
    .repeat()
    .shuffle(500)
    .decode('pil')
    .to_tuple('jpg')
    .map_tuple(_pillow_crop)
    .batched(_BATCH)
  )
  for (batch,) in webdataset.WebLoader(dataset, batch_size=None, num_workers=0):
    yield batch


_METHODS = {
  'bare': _bare,
  'mlcd_jax': _mlcd_jax,
  'torch': _torch,
  'webdataset': _webdataset,
}


def _pillow_crop(image: Image.Image):
  """Torchvision's RandomResizedCrop, flip and PILToTensor."""
  import torch

  rng = np.random.default_rng()
  left, top, width, height = _crop(rng, *image.size)
  image = image.convert('RGB').crop((left, top, left + width, top + height))
  image = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
  if rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _crop(rng, width: int, height: int) -> tuple[int, int, int, int]:
  """The same distribution for all: left, top, width, height."""
  kept = width * height * rng.uniform(*_AREA)
  ratio = math.exp(rng.uniform(*map(math.log, _ASPECT_RATIO)))
  w = min(width, round(math.sqrt(kept * ratio)))
  h = min(height, round(math.sqrt(kept / ratio)))
  return (
    int(rng.integers(width - w + 1)),
    int(rng.integers(height - h + 1)),
    w,
    h,
  )


def _make_tars(folder: pathlib.Path, size: tuple[int, int]) -> None:
  """Tars of 500 crops of scikit-image's photos, JPEG of quality 90, repeated.

  Repeated, because a handful of images would stay in the processor's caches.
  """
  images = list(_make_images(500, size))
  folder.mkdir()
  for shard in range(_NUM_TARS):
    with tarfile.open(folder / f'{shard:05d}.tar', 'w') as tar:
      for i, image in enumerate(images):
        info = tarfile.TarInfo(f'{shard:05d}{i:04d}.jpg')
        info.size = len(image)
        tar.addfile(info, io.BytesIO(image))


def _make_images(count: int, size: tuple[int, int]) -> Iterator[bytes]:
  import skimage.data

  photos = [
    Image.fromarray(photo())
    for photo in (
      skimage.data.astronaut,
      skimage.data.chelsea,
      skimage.data.coffee,
      skimage.data.rocket,
    )
  ]
  rng = np.random.default_rng(0)
  for i in range(count):
    photo = photos[i % len(photos)]
    scale = rng.uniform(0.7, 1)
    w = int(min(photo.width, photo.height * size[0] / size[1]) * scale)
    h = int(w * size[1] / size[0])
    x = int(rng.integers(photo.width - w + 1))
    y = int(rng.integers(photo.height - h + 1))
    out = io.BytesIO()
    photo = photo.resize(size, Image.Resampling.LANCZOS, (x, y, x + w, y + h))
    photo.save(out, 'JPEG', quality=90)
    yield out.getvalue()


def _read_tars(folder: str):
  for path in sorted(pathlib.Path(folder).glob('*.tar')):
    with tarfile.open(path) as tar:
      for member in tar:
        yield member.name, tar.extractfile(member).read()


if __name__ == '__main__':
  main()
