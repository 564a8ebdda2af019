"""The embedded images of several objects: scenes composed of MNIST's digits.

The digits are split first, so that no digit of a training scene is seen in a
validation or test scene. A scene draws two to six of them on a canvas, each
with a place, a size and a colour of its own, over noise and fragments of other
digits. It knows the class, the colour and the box of every object.

A TFDS builder like `digits`: `data.path=scenes`, or `scenes/NAME` with a name
of `CONFIGS`.
"""

import dataclasses
import io

import cv2
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from mlcd_jax.data import digits

COLOURS = {
  'white': (255, 255, 255),
  'red': (255, 70, 60),
  'green': (70, 220, 80),
  'blue': (90, 130, 255),
  'yellow': (250, 220, 50),
}

# Scenes of a split, and a number that makes its seed.
_SPLITS = {'train': (6_000, 0), 'validation': (1_000, 1), 'test': (2_000, 2)}

# Tries to place an object at each size. Six of the largest digits fit on a
# canvas in one order of places and not in another.
_TRIES = 30

# Factor of the size after these tries.
_SHRINK = 0.85

# Clutter is at most this bright, so that it is darker than every object.
_CLUTTER_BRIGHTNESS = 0.6


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
  """What makes a scene hard.

  Attributes:
    canvas: pixels of a side.
    num_objects: the smallest and the largest number of objects.
    size: the smallest and the largest longer side of a digit's box, as a share
      of the canvas.
    overlap: pixels by which two boxes may overlap in both directions.
    clutter: fragments of other digits.
    noise: standard deviation of the background, of 255.
    distinct: True if the objects are of different classes.
    coloured: False for white digits on black.
    quadrants: True for four objects, each in its quarter of the canvas.
  """

  canvas: int = 64
  num_objects: tuple[int, int] = (2, 6)
  size: tuple[float, float] = (0.28, 0.45)
  overlap: int = 2
  clutter: int = 3
  noise: float = 12.0
  distinct: bool = False
  coloured: bool = True
  quadrants: bool = False


CONFIGS = (
  ScenesConfig(name='free', description='Two to six digits anywhere.'),
  ScenesConfig(
    name='quadrants',
    description='Four different digits of full size, one in each quarter.',
    canvas=56,
    num_objects=(4, 4),
    size=(20 / 56, 20 / 56),
    clutter=0,
    noise=0,
    distinct=True,
    coloured=False,
    quadrants=True,
  ),
  ScenesConfig(
    name='crowded',
    description='Four to six digits that overlap, over much clutter.',
    num_objects=(4, 6),
    overlap=6,
    clutter=8,
    noise=30.0,
  ),
)


@dataclasses.dataclass(frozen=True)
class Scene:
  """One composed image.

  Attributes:
    pixels: uint8 [S, S, 3].
    boxes: int [n, 4]: left, top, right and bottom in pixels, the last two
      exclusive.
    labels: int [n], the digits.
    colours: int [n], places in `COLOURS`.
  """

  pixels: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  colours: np.ndarray


def compose(
  config: ScenesConfig,
  glyphs: list[np.ndarray],
  labels: np.ndarray,
  rng: np.random.Generator,
) -> Scene:
  """Composes one scene.

  Args:
    config: what the scene is like.
    glyphs: digits uint8 [height, width], cut to what is drawn.
    labels: int [len(glyphs)], their classes.
    rng: the randomness; the same state gives the same scene.
  """
  side = config.canvas
  canvas = np.clip(rng.normal(0, config.noise, (side, side, 3)), 0, 255)
  for _ in range(config.clutter):
    _draw_fragment(canvas, glyphs[rng.integers(len(glyphs))], rng)
  boxes, classes, colours = [], [], []
  wanted = rng.integers(config.num_objects[0], config.num_objects[1] + 1)
  for number in range(wanted):
    place = _draw_glyph(labels, classes if config.distinct else (), rng)
    box = _place(config, glyphs[place].shape, number, boxes, rng)
    if box is None:
      continue
    colour = int(rng.integers(len(COLOURS))) if config.coloured else 0
    _paint(canvas, glyphs[place], box, list(COLOURS.values())[colour])
    boxes.append(box)
    classes.append(int(labels[place]))
    colours.append(colour)
  return Scene(
    canvas.astype(np.uint8),
    np.array(boxes),
    np.array(classes),
    np.array(colours),
  )


def _draw_glyph(labels, taken, rng) -> int:
  """Draws a digit whose class is not taken."""
  while True:
    place = int(rng.integers(len(labels)))
    if labels[place] not in taken:
      return place


def _place(config, shape, number, boxes, rng) -> tuple[int, ...] | None:
  """Draws a box (left, top, right, bottom); None if there is no room."""
  side = config.canvas
  size = rng.uniform(*config.size) * side
  while size >= config.size[0] * side * _SHRINK:
    high, wide = (max(1, round(size * n / max(shape))) for n in shape)
    for _ in range(_TRIES):
      if config.quadrants:
        # As if the digit's 28 pixels were moved by up to two each way.
        middle = np.array([number % 2, number // 2]) * side // 2 + side // 4
        corner = middle - np.array([wide, high]) // 2 + rng.integers(-2, 3, 2)
        left, top = np.clip(corner, 0, [side - wide, side - high])
      else:
        left, top = rng.integers([side - wide + 1, side - high + 1])
      box = int(left), int(top), int(left) + wide, int(top) + high
      if all(_overlap(box, other) <= config.overlap for other in boxes):
        return box
    size *= _SHRINK
  return None


def _overlap(box, other) -> int:
  """Returns the smaller side of the rectangle that two boxes share."""
  wide = min(box[2], other[2]) - max(box[0], other[0])
  high = min(box[3], other[3]) - max(box[1], other[1])
  return max(0, min(wide, high))


def _paint(canvas, glyph, box, colour) -> None:
  """Draws a digit into its box, over what is there."""
  left, top, right, bottom = box
  opacity = _resize(glyph, right - left, bottom - top)[..., None]
  part = canvas[top:bottom, left:right]
  part[:] = part * (1 - opacity) + np.array(colour) * opacity


def _draw_fragment(canvas, glyph, rng) -> None:
  """Adds a piece of a digit that is too small to be read, in dim grey."""
  size = 8
  top, left = (rng.integers(max(1, n - size)) for n in glyph.shape)
  piece = glyph[top : top + size, left : left + size]
  high, wide = piece.shape
  y, x = rng.integers([len(canvas) - high, len(canvas) - wide])
  opacity = piece[..., None] / 255 * rng.uniform(0.3, _CLUTTER_BRIGHTNESS)
  part = canvas[y : y + high, x : x + wide]
  part[:] = part * (1 - opacity) + 255 * opacity


def _resize(glyph, width, height) -> np.ndarray:
  """Returns the digit as opacities float [height, width]."""
  shrinks = max(height, width) < max(glyph.shape)
  how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  return cv2.resize(glyph, (width, height), interpolation=how) / 255.0


class MlcdScenes(tfds.core.GeneratorBasedBuilder):
  """Scenes of digits with the class, the colour and the box of each object."""

  VERSION = tfds.core.Version('1.1.0')
  BUILDER_CONFIGS = list(CONFIGS)

  def _info(self) -> tfds.core.DatasetInfo:
    side = self.builder_config.canvas
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'Scenes of several digits of MNIST (LeCun et al., 1998), composed. '
        + self.builder_config.description
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(side, side, 3), encoding_format='png'
          ),
          'caption': tfds.features.Text(),
          'objects': tfds.features.Sequence(
            {
              'bbox': tfds.features.BBoxFeature(),
              'label': tfds.features.ClassLabel(names=list(digits.WORDS)),
              'colour': tfds.features.ClassLabel(names=list(COLOURS)),
            }
          ),
        }
      ),
      homepage='https://yann.lecun.com/exdb/mnist/',
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    pixels, labels, rows = digits.read()
    return {
      split: self._generate_examples(
        pixels[rows[split]], labels[rows[split]], *s
      )
      for split, s in _SPLITS.items()
    }

  def _generate_examples(self, pixels, labels, count, seed):
    glyphs = [cut(p) for p in pixels]
    for i in range(count):
      rng = np.random.default_rng((seed, i))
      yield i, _example(compose(self.builder_config, glyphs, labels, rng))


def cut(pixels: np.ndarray) -> np.ndarray:
  """Cuts a digit to the rows and columns in which something is drawn."""
  drawn = pixels > 64  # Fainter pixels are the pen's soft edge.
  top, bottom = np.flatnonzero(drawn.any(1))[[0, -1]]
  left, right = np.flatnonzero(drawn.any(0))[[0, -1]]
  return pixels[top : bottom + 1, left : right + 1]


def _example(scene: Scene) -> dict:
  """Returns the features of a scene as TFDS takes them."""
  png = io.BytesIO()
  Image.fromarray(scene.pixels).save(png, 'PNG', compress_level=1)
  png.seek(0)
  colours, side = list(COLOURS), len(scene.pixels)
  names = [
    f'a {colours[c]} {digits.WORDS[label]}'
    for c, label in zip(scene.colours, scene.labels)
  ]
  return {
    'image': png,
    'caption': ' and '.join([', '.join(names[:-1]), names[-1]]),
    'objects': [
      {
        'bbox': tfds.features.BBox(
          ymin=top / side,
          xmin=left / side,
          ymax=bottom / side,
          xmax=right / side,
        ),
        'label': int(label),
        'colour': int(colour),
      }
      for (left, top, right, bottom), label, colour in zip(
        scene.boxes, scene.labels, scene.colours
      )
    ],
  }
