"""Values that the authors published, where the weights are on this disk.

  MLCD_JAX_PUBLISHED=DIR python -m pytest tests/weights/published_test.py

with DIR/mlcd-vit-bigG-patch14-336, DIR/mlcd-vit-bigG-patch14-448 (the folders
of DeepGlint-AI on the hub) and DIR/000000039769.jpg of COCO val2017. A bigG
takes 8 GB of memory.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

from mlcd_jax.data import transforms
from mlcd_jax.weights import huggingface
from mlcd_jax.weights import preprocessing

# last_hidden_state[0, 0, :5], of transformers' conversion script for MLCD.
VALUES = {
  'mlcd-vit-bigG-patch14-336': (-0.8921, -0.1069, 0.2989, 0.6018, -0.5892),
  'mlcd-vit-bigG-patch14-448': (-0.8978, -0.1181, 0.4769, 0.4761, -0.5779),
}


@pytest.mark.parametrize('name', VALUES)
def test_published_values(name):
  folder = pathlib.Path(os.environ.get('MLCD_JAX_PUBLISHED', '')) / name
  if not (folder / 'config.json').is_file():
    pytest.skip(f'MLCD_JAX_PUBLISHED has no {name}')
  model, variables = huggingface.from_huggingface(folder, scan_layers=False)
  prepare = preprocessing.read(folder, 'mlcd', model.image_size)
  photo = (folder.parent / '000000039769.jpg').read_bytes()
  images = prepare(transforms.decode(photo))[None]
  hidden = jax.jit(model.apply)(variables, images)['hidden']
  np.testing.assert_allclose(hidden[0, 0, :5], VALUES[name], atol=1e-4)
