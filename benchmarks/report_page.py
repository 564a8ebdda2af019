"""How long the report.html of a run with 1M clusters takes to open.

  pip install -r requirements-test.txt   # Playwright
  python benchmarks/report_page.py

makes up labels of 2,000,000 images, writes the page that a run would write of
them, with pictures of noise, which no codec makes small, and long captions; and
opens it in headless Chromium, each time in a new profile, until it is drawn.
"""

import argparse
import io
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
from PIL import Image

from mlcd_jax.page import browser as browser_lib
from mlcd_jax.page import clusters
from mlcd_jax.page import render
from mlcd_jax.runtime import files

_DRAWN = """() => new Promise(
  (done) => requestAnimationFrame(() => requestAnimationFrame(done)))"""


class Photos:
  """Records of noise with captions; both a source and its embeddings."""

  num_classes = 10

  def __init__(self, count: int):
    self._keys = np.array([b'%09d' % i for i in range(count)])
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'PNG')
    self._image = out.getvalue()

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int):
    return {'image': self._image, 'label': index % 10}

  def keys(self) -> np.ndarray:
    """See sources.Source."""
    return self._keys

  def metadata(self, rows):
    """See embeddings.Embeddings."""
    keys = [self._keys[row].decode() for row in rows]
    return keys, [f'word{row % 5_000} ' * 60 for row in rows]


def write_page(folder: pathlib.Path, *, num_clusters: int) -> pathlib.Path:
  """Writes report.html of clusters with two images in the mean.

  Args:
    folder: where it and the labels go.
    num_clusters: how many the run has.
  """
  rng = np.random.default_rng(0)
  num_images = 2 * num_clusters
  shape = (num_images, 10)
  labels = rng.integers(num_clusters, size=shape, dtype=np.int32)
  scores = rng.random(shape, np.float32).astype(np.float16)
  files.write_npy(folder / 'labels_00000.npy', labels)
  files.write_npy(folder / 'scores_00000.npy', scores)
  centers = rng.normal(size=(num_clusters, 4)).astype(np.float32)
  centers /= np.linalg.norm(centers, axis=1, keepdims=True)
  photos = Photos(num_images)
  shards = clusters.Shards(folder, [num_images])
  found = browser_lib.gather(
    browser_lib.Inputs(photos, photos, shards, centers, 8, 0)
  )
  steps = list(range(1_000))
  path = folder / 'report.html'
  path.write_text(
    render.render(
      {
        'title': 'huge',
        'workdir': 'runs/huge',
        'written': 0,
        'status': {'text': 'train is running', 'done': False, 'failed': False},
        'summary': [],
        'stages': [],
        'curves': {'step': steps, 'values': {'train/loss': steps}},
        'clustering': None,
        'clusters': found,
        'results': {},
        'encoders': {},
        'patches': [],
        'bad': [],
        'preset': 'x',
        'config': [],
      }
    )
  )
  return path


def seconds_to_open(path: pathlib.Path, *, loads: int) -> list[float]:
  """Returns the time from asking for the page until it is drawn, each load."""
  from playwright import sync_api

  found = []
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=shutil.which('chromium') or shutil.which('chrome'),
      args=['--no-sandbox'],
    )
    for _ in range(loads):
      context = browser.new_context(offline=True)
      page = context.new_page()
      start = time.perf_counter()
      page.goto(path.as_uri())
      page.evaluate(_DRAWN)
      found.append(time.perf_counter() - start)
      assert page.locator('#image-detail li').count() == 8
      context.close()
    browser.close()
  return found


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clusters', type=int, default=1_000_000)
  parser.add_argument('--loads', type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    path = write_page(pathlib.Path(name), num_clusters=args.clusters)
    seconds = seconds_to_open(path, loads=args.loads)
    megabytes = path.stat().st_size / 1e6
  print(
    json.dumps(
      {
        'megabytes': round(megabytes, 1),
        'seconds': [round(s, 2) for s in seconds],
        'median': round(statistics.median(seconds), 2),
      }
    )
  )


if __name__ == '__main__':
  main()
