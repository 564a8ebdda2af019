"""A ResNet as the `ResNetModel` of transformers, which has no projection."""

from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlcd_jax.models import resnet

_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'variance': 'running_var',
}


def to_config(model: resnet.ResNet) -> dict[str, Any]:
  """Returns config.json of a model."""
  stages = range(len(model.blocks))
  return dict(
    architectures=['ResNetModel'],
    model_type='resnet',
    num_channels=3,
    embedding_size=model.width,
    hidden_sizes=[resnet.EXPANSION * model.width * 2**i for i in stages],
    depths=list(model.blocks),
    layer_type='bottleneck',
    hidden_act='relu',
    downsample_in_bottleneck=False,
    dtype='float32',
  )


def tensors(model: resnet.ResNet) -> Iterator[tuple[str, str, str]]:
  """Of every parameter but the projection's its path, tensor and kind."""
  for ours, theirs in _layers(model):
    conv, norm = ours.format('conv'), ours.format('norm')
    tensor = theirs.format('convolution')
    yield f'{conv}/kernel', f'{tensor}.weight', 'convolution'
    tensor = theirs.format('normalization')
    for name, their_name in _NORM.items():
      yield f'{norm}/{name}', f'{tensor}.{their_name}', 'same'


def counters(names: Iterable[str]) -> dict[str, np.ndarray]:
  """PyTorch's counts of batches, which its averages do not need, as zero."""
  return {
    name.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for name in names
    if name.endswith('running_mean')
  }


def _layers(model: resnet.ResNet) -> Iterator[tuple[str, str]]:
  """A convolution's and its norm's names, here and there."""
  yield 'stem_{}', 'embedder.embedder.{}'
  block = 0
  for stage, count in enumerate(model.blocks):
    for i in range(count):
      ours, theirs = f'block_{block:02d}', f'encoder.stages.{stage}.layers.{i}'
      for layer in range(3):
        yield f'{ours}/{{}}_{layer + 1}', f'{theirs}.layer.{layer}.{{}}'
      if not i:
        yield f'{ours}/shortcut_{{}}', f'{theirs}.shortcut.{{}}'
      block += 1
