"""The page in a real browser: no request, no error, search, keyboard, size."""

import io
import shutil

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import report_page
from mlcd_jax import stages

sync_api = pytest.importorskip('playwright.sync_api')

_CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not _CHROMIUM, reason='needs Chromium'),
]

_EVIL = '</script><script>window.hurt = 1</script><img src=x onerror="hurt=1">'
_SIZES = {'phone': (390, 844), 'desktop': (1280, 900)}


def picture(number, size=40):
  """A PNG, bright at one of four heights."""
  rng = np.random.default_rng(number)
  pixels = rng.integers(0, 90, (size, size, 3), np.uint8)
  pixels[number % 4 * size // 4 :][: size // 4] += 150
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


@pytest.fixture(scope='module', name='made')
def fixture_made(tmp_path_factory):
  return tmp_path_factory.mktemp('page')


@pytest.fixture(name='path')
def fixture_path(made, tiny_config):
  """The page of a finished run with hostile captions and a bad image."""
  workdir = made / 'run'
  if workdir.exists():
    return workdir / 'report.html'
  images = [picture(i) for i in range(100)]
  images[17] = b'no image'
  colours = ['red', 'green', 'blue', 'grey']
  table = pa.table(
    {
      'image': images,
      'label': [i % 4 for i in range(100)],
      'caption': [f'{colours[i % 4]} stripe {_EVIL}' for i in range(100)],
    }
  )
  pq.write_table(table, made / 'data.parquet')
  config = tiny_config
  config.data.source = 'parquet'
  config.data.path = str(made / 'data.parquet')
  config.data.split = 'train'
  config.data.max_bad_fraction = 0.1
  config.cluster.num_centers = 24
  config.evaluate.tasks = ('knn',)
  stages.run(config, workdir)
  return workdir / 'report.html'


@pytest.fixture(scope='module', name='chromium')
def fixture_chromium():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=_CHROMIUM, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@pytest.fixture(name='open_page')
def fixture_open_page(chromium):
  """(path, options) -> page; fails the test on what a page must not do."""
  wrong, contexts = [], []

  def open_page(path, **options):
    context = chromium.new_context(offline=True, **options)
    contexts.append(context)
    page = context.new_page()
    page.on('console', lambda m: wrong.append(f'console: {m.text}'))
    page.on('pageerror', lambda e: wrong.append(f'error: {e}'))
    page.on('dialog', lambda d: (wrong.append('dialog'), d.dismiss()))
    page.on(
      'request',
      lambda r: (
        r.url.startswith(('data:', path.as_uri()))
        or wrong.append(f'request: {r.url}')
      ),
    )
    page.goto(path.as_uri())
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert not wrong


def test_every_section_is_there(path, open_page):
  page = open_page(path)
  assert page.inner_text('#status').startswith('finished')
  links = page.locator('nav a').evaluate_all('l => l.map(a => a.hash)')
  assert links == [
    '#summary',
    '#curves',
    '#time',
    '#clusters',
    '#duplicates',
    '#images',
    '#quality',
    '#results',
    '#patches',
    '#data',
    '#config',
  ]
  for link in links:
    assert page.locator(f'{link} h2').is_visible()
  for curve in ('loss', 'learning rate', 'gradient norm', 'images per second'):
    assert page.locator('#curves figcaption b', has_text=curve).count() == 1
  for part in ('waiting for data', 'saving', 'evaluate'):
    assert part in page.inner_text('#time')
  assert 'purity' in page.inner_text('#quality')
  for encoder in ('trained', 'embedder', 'random', 'raw pixels'):
    assert encoder in page.inner_text('#results')
  assert page.locator('#patches img').count() == 16
  assert 'not an image' in page.inner_text('#data')
  changed = page.locator('#config .changed').all_inner_texts()
  assert any(row.startswith('data.max_bad_fraction') for row in changed)
  assert page.evaluate(
    '[...document.images].filter(i => i.complete && !i.naturalWidth).length'
  ) == 0  # fmt: skip


def test_captions_are_inert(path, open_page):
  page = open_page(path)
  assert page.evaluate('window.hurt') is None
  assert _EVIL in page.inner_text('#image-detail')
  assert page.locator('script').count() == 2


def test_clusters_are_searched_and_sorted(path, open_page):
  page = open_page(path)
  cards = page.locator('#cluster-cards article')
  assert cards.count() > 10
  assert cards.first.locator('img').count() > 1
  page.fill('#cluster-search', 'green')
  names = cards.locator('h3').all_inner_texts()
  assert 0 < len(names) < 24 and all('green' in name for name in names)
  page.fill('#cluster-search', '#1')  # A number, and not those it begins.
  assert len(cards.all_inner_texts()) <= 1
  page.fill('#cluster-search', 'no such words')
  assert cards.count() == 0
  page.fill('#cluster-search', '')
  sizes = []
  for order in ('largest first', 'smallest first'):
    page.get_by_label('Order').select_option(order)
    facts = cards.locator('p').all_inner_texts()
    sizes.append([int(text.split()[0]) for text in facts])
  assert sizes[0] == sorted(sizes[0], reverse=True)
  assert sizes[1] == sorted(sizes[1])
  assert sizes[0][0] > sizes[1][0]


def test_images_are_searched_and_shown_with_their_labels(path, open_page):
  page = open_page(path)
  assert page.locator('#image-detail li').count() == 8
  assert page.locator('#image-detail li img').count() >= 8
  page.fill('#image-search', 'blue')
  assert 'class 2' in page.inner_text('#image-detail > div')
  before = page.inner_text('#image-detail > div')
  page.locator('.picker button').nth(1).click()
  assert page.inner_text('#image-detail > div') != before


def test_everything_is_reached_by_keyboard(path, open_page):
  page = open_page(path)
  page.keyboard.press('Tab')
  assert page.evaluate('document.activeElement.className') == 'skip'
  reached = set()
  for _ in range(150):
    page.keyboard.press('Tab')
    reached.add(
      page.evaluate(
        '(document.activeElement.closest(".picker") ? "picker" : '
        'document.activeElement.id || document.activeElement.tagName)'
      )
    )
  assert {'cluster-search', 'SELECT', 'ARTICLE', 'image-search'} <= reached
  assert {'picker', 'config-search'} <= reached
  page.locator('.picker button').nth(2).focus()
  page.keyboard.press('Enter')
  assert (
    page.locator('.picker button').nth(2).get_attribute('aria-current')
    == 'true'
  )


@pytest.mark.parametrize('size', _SIZES)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_page_fits_the_screen(path, open_page, size, scheme):
  width, height = _SIZES[size]
  page = open_page(
    path, viewport={'width': width, 'height': height}, color_scheme=scheme
  )
  assert page.evaluate('document.documentElement.scrollWidth') == width
  shot = page.screenshot(path=path.with_name(f'{size}_{scheme}.png'))
  pixels = np.asarray(Image.open(io.BytesIO(shot)).convert('L'))
  dark = np.median(pixels) < 60
  assert dark == (scheme == 'dark')
  assert pixels.std() > 10  # Something is drawn on it.


@pytest.fixture(name='huge')
def fixture_huge(tmp_path):
  """The page of 1M clusters of two images in the mean."""
  return report_page.write_page(tmp_path, num_clusters=1_000_000)


def test_a_million_clusters_stay_small(huge, open_page):
  assert 2e6 < huge.stat().st_size < 25e6
  page = open_page(huge)
  assert 'sampled from 1,000,000' in page.inner_text('#clusters')
  assert page.locator('#image-detail li').count() == 8
  assert page.locator('#quality').count() == 1
