"""Names and config of a ResNet as the `ResNetModel` of transformers.

A `ResNetModel` has no projection, so the projection is not exported.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlcd_jax.models import resnet

# A batch norm's parameters here and the names PyTorch gives them.
_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'variance': 'running_var',
}


def to_config(model: resnet.ResNet) -> dict[str, Any]:
  """Returns the content of config.json for a model."""
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
    downsample_in_bottleneck=False,  # The 3 x 3 convolution has the stride.
    dtype='float32',
  )


def tensors(model: resnet.ResNet) -> Iterator[tuple[str, str, str]]:
  """Yields a tuple for every parameter except the projection.

  Args:
    model: the ResNet.

  Yields:
    (path of the parameter, name of the tensor, `kind` of a layouts.Part).
  """
  for ours, theirs in _layers(model):
    conv, norm = ours.format('conv'), ours.format('norm')
    tensor = theirs.format('convolution')
    yield f'{conv}/kernel', f'{tensor}.weight', 'convolution'
    tensor = theirs.format('normalization')
    for name, their_name in _NORM.items():
      yield f'{norm}/{name}', f'{tensor}.{their_name}', 'same'


def counters(names: Iterable[str]) -> dict[str, np.ndarray]:
  """Returns the counter of batches that PyTorch saves with each batch norm.

  The counters are zero. They complete the tensors of a `ResNetModel`; PyTorch
  uses them only where a batch norm has no fixed momentum.

  Args:
    names: the names of the exported tensors.

  Returns:
    Int64 scalars by tensor name, one per running mean.
  """
  return {
    name.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for name in names
    if name.endswith('running_mean')
  }


def _layers(model: resnet.ResNet) -> Iterator[tuple[str, str]]:
  """Yields (name here, name in the file) for every convolution and its norm.

  Both names are templates. Their field takes conv or norm here, and convolution
  or normalization in the file.
  """
  yield 'stem_{}', 'embedder.embedder.{}'
  block = 0  # Blocks are numbered through here, but within stages there.
  for stage, count in enumerate(model.blocks):
    for i in range(count):
      ours, theirs = f'block_{block:02d}', f'encoder.stages.{stage}.layers.{i}'
      for layer in range(3):
        yield f'{ours}/{{}}_{layer + 1}', f'{theirs}.layer.{layer}.{{}}'
      if not i:
        yield f'{ours}/shortcut_{{}}', f'{theirs}.shortcut.{{}}'
      block += 1
