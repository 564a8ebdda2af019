"""Plans a config's memory and time on a TPU slice without having one.

  python -m mlcd_jax.plan --config=configs/vit_l14.py:laion400m \
    --topology=v5e:16x16 [--json]

It compiles the real programs for the topology and prints the bytes, FLOPs and
collectives of each device. The compiler is libtpu, which needs no TPU (`pip
install -r requirements-tpu.txt`). It reads no data and downloads nothing.
"""

import os

# jax reads these when it is imported. They keep it from using a TPU of this
# machine and from asking the metadata server of the cloud.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
# Hides the errors that libtpu logs on a machine without a TPU.
os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
# Another plan, or a run, may use libtpu at the same time.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import collections
import json
import logging
import math
import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from mlcd_jax.config import fields
from mlcd_jax.config import mesh as mesh_lib
from mlcd_jax.config import sizes
from mlcd_jax.data import views
from mlcd_jax.runtime import chips as chips_lib
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import hlo
from mlcd_jax.train import flops as flops_lib

# __name__ is __main__ when this module runs as a command.
_log = logging.getLogger('mlcd_jax.plan')

# A TPU makes a product of float32 (Precision.HIGHEST) of six of bfloat16.
_FLOAT32_PRODUCTS = 6


def main(rest: list[str]) -> None:
  """Makes the plan and prints it."""
  if rest:
    raise errors.UserError(f'{rest[0]!r} is not a flag; they begin with --')
  plan = make(
    flags.FLAGS.config,
    name=_config_name(sys.argv),
    topology=flags.FLAGS.topology,
    utilisation=flags.FLAGS.utilisation,
  )
  print(json.dumps(plan) if flags.FLAGS.json else table(plan))


def _config_name(argv: list[str]) -> str:
  """Returns the value of --config as given."""
  flags_given = [arg.lstrip('-') for arg in argv[1:]]
  for i, arg in enumerate(flags_given):
    if arg == 'config':  # Its value is the next argument.
      return flags_given[i + 1]
    if arg.startswith('config='):
      return arg.partition('=')[2]
  return ''


def make(
  config, *, name: str, topology: str, utilisation: float = 0.5
) -> dict[str, Any]:
  """Compiles every program and returns its memory and time per device.

  Args:
    config: the config; see `config.default`.
    name: the name of the config in the result.
    topology: the name of a TPU slice, such as v5e:16x16.
    utilisation: the share of a chip's peak FLOP/s that is reached.

  Raises:
    UserError: libtpu is missing, or the config does not fit the topology.
  """
  from mlcd_jax.config import check as config_check

  # These sections choose what to read, and a plan reads nothing.
  config_check.check(config, skip=('data', 'embed', 'evaluate'))
  if not 0 < utilisation <= 1:
    raise errors.UserError(f'--utilisation={utilisation} is outside 0 to 1')
  devices = _devices(topology, config.mesh.slices)
  return {
    'config': name,
    'topology': topology,
    'devices': len(devices),
    'utilisation': utilisation,
    'programs': _embed(config, devices, utilisation)
    | _kmeans(config, devices, utilisation)
    | {'train': _train(config, devices, utilisation)},
  }


def _devices(topology: str, slices: int) -> list[Any]:
  """Returns the devices of a topology; they can only be compiled for."""
  from jax.experimental import topologies

  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise errors.UserError(
      '--topology: compiling for TPUs needs libtpu; run pip install -r '
      'requirements-tpu.txt'
    ) from e
  kwargs = {'num_slices': slices} if slices > 1 else {}
  if topology.startswith('v4:'):  # jax uses both cores of a chip as one device.
    kwargs['chip_config_name'] = 'megacore'
  try:
    found = topologies.get_topology_desc(topology, platform='tpu', **kwargs)
  except Exception as e:  # libtpu's own errors have no common class.
    said = re.sub(r'\s+', ' ', str(e))[:200]
    raise errors.UserError(
      f'--topology={topology}: libtpu knows no such slice ({said}); use a '
      'name such as v5e:16x16, v5p:4x4x4 or v6e:16x16'
    ) from e
  return list(found.devices)


def _embed(config, devices, utilisation) -> dict[str, Any]:
  """Plans a batch of the embedder; {} if its architecture is unknown."""
  from mlcd_jax import models
  from mlcd_jax.config import presets
  from mlcd_jax.embed import encoder
  from mlcd_jax.weights import huggingface

  fields = presets.embedder(config)
  if fields is None:
    return {}
  batch_size = config.embed.batch_size
  model = models.make(fields)
  params = huggingface.abstract_params(model)
  out = hlo.compile_sizes(
    'embed',
    *encoder.abstract_call(model, params, devices, batch_size),
  )
  flops = batch_size * flops_lib.encoder_flops(fields)
  out |= _bounds(out, flops, _chip(devices), utilisation)
  num_rows = presets.num_images(config)
  if num_rows:
    num_rows *= 1 + views.count(config.embed.views)
  steps = num_rows and -(-num_rows // (batch_size * len(devices)))
  return {
    'embed': out
    | {
      'mesh': {'batch': len(devices)},
      'steps': steps,
      'days': steps and steps * out['seconds_per_step'] / 86_400,
      'advice': None if out['fits'] else f'lower embed.batch_size={batch_size}',
    }
  }


def _kmeans(config, devices, utilisation) -> dict[str, Any]:
  """Plans a pass of k-means; {} if the width or number of rows is unknown."""
  from mlcd_jax import kmeans
  from mlcd_jax.config import presets

  fields, num_images = presets.embedder(config), presets.num_images(config)
  if fields is None or not num_images:
    return {}
  on_views = config.cluster.fit_on == 'views'
  num_rows = num_images * (views.count(config.embed.views) if on_views else 1)
  dim = fields.embedding_dim
  mesh = mesh_lib.from_config(config, devices=devices)
  num_centers = _num_centers(config, num_images)
  out = hlo.compile_sizes(
    'kmeans', *kmeans.abstract_pass(mesh, num_centers, dim)
  )
  chip = _chip(devices)
  # The program takes one chunk of points; the devices hold more beside it.
  held = kmeans.held_bytes(num_rows, dim, mesh, chip.memory)
  out['bytes_per_chip'] += held
  row_flops = 2 * num_centers * dim / len(devices)
  flops = num_rows * row_flops
  label_flops = (
    _FLOAT32_PRODUCTS * _label_passes(config) * num_images * row_flops
  )
  out |= _bounds(out | {'bytes_moved': None}, flops, chip, utilisation)
  return {
    'kmeans': out
    | {
      'points': held,
      'mesh': dict(mesh.shape),
      'steps': config.cluster.iterations,
      'days': config.cluster.iterations * out['seconds_per_step'] / 86_400,
      'label_seconds': label_flops / (utilisation * chip.flops),
      'advice': None
      if out['fits']
      else f'raise mesh.fsdp={config.mesh.fsdp}, which splits the centers',
    }
  }


def _label_passes(config) -> int:
  """Returns how often the label rule compares an image with all centers."""
  passes = {'nearest': 1, 'pursuit': config.cluster.num_labels}
  return passes.get(config.cluster.rule, views.count(config.embed.views))


def _num_centers(config, num_images) -> int:
  """Returns the number of centers; an error if the config leaves it open."""
  if not config.cluster.num_centers and not num_images:
    raise errors.UserError(
      'cluster.num_centers=0 depends on the number of images, which is not '
      'known here; set --config.cluster.num_centers'
    )
  return sizes.num_centers(config, num_images)


def _train(config, devices, utilisation) -> dict[str, Any]:
  """Plans the train step."""
  from mlcd_jax.config import presets
  from mlcd_jax.train import step

  mesh = mesh_lib.from_config(config, devices=devices)
  num_images = presets.num_images(config)
  steps = config.train.steps
  if num_images:
    steps = sizes.num_steps(config, num_images)
  program = step.Program(
    config=config,
    num_classes=_num_centers(config, num_images),
    steps=steps or 1,
    mesh=mesh,
  )
  parts = flops_lib.train_flops(config, program.num_classes)
  images = config.train.batch_size / len(devices)
  flops = images * sum(parts.values())
  if config.model.remat == 'full':
    # The backward pass repeats the forward pass, a third of the total.
    flops += images * parts['encoder'] / 3
  chip = _chip(devices)
  out = hlo.compile_sizes(
    'train', program.step, (program.abstract_state, program.abstract_batch)
  )
  out |= _bounds(out, flops, chip, utilisation)
  out |= {
    'classifier_share': parts['classifier'] / sum(parts.values()),
    'steps': steps or None,
    'days': steps * out['seconds_per_step'] / 86_400 if steps else None,
    'mesh': dict(mesh.shape),
  }
  out['advice'] = None if out['fits'] else _advice(config, out, chip)
  return out


def _chip(devices):
  """Returns the limits of one device; devices of a chip share coordinates."""
  per_chip = max(
    collections.Counter(tuple(d.coords) for d in _first(devices)).values()
  )
  chip = chips_lib.find(devices[0].device_kind, devices_per_chip=per_chip)
  if chip is None:
    raise errors.UserError(
      f'--topology: nothing is known of {devices[0].device_kind}'
    )
  return chip


def _first(devices):
  """Returns the devices of the first slice."""
  index = lambda d: getattr(d, 'slice_index', None) or 0  # noqa: E731
  return [d for d in devices if index(d) == 0]


def _bounds(out, flops, chip, utilisation) -> dict[str, Any]:
  """Returns the least time of a step by FLOPs and by memory traffic."""
  products = flops / (utilisation * chip.flops)
  # XLA counts the body of a loop once, so this is a lower bound.
  memory = (out['bytes_moved'] or 0) / chip.bandwidth
  return {
    'fits': out['fits'] and out['bytes_per_chip'] <= chip.memory,
    'memory': chip.memory,
    'flops': flops,
    'seconds_per_step': max(products, memory),
    'bound': 'FLOPs' if products >= memory else 'memory traffic',
  }


def _advice(config, out, chip) -> str:
  """Returns the change of a field that frees the most memory."""
  held = out['arguments']
  if held is not None and held > chip.memory / 2:
    return f'raise mesh.fsdp={config.mesh.fsdp}: the state fills the memory'
  if config.model.remat != 'full':
    return f'set model.remat=full, which is {config.model.remat}'
  images = config.train.batch_size // (
    out['mesh']['data'] * out['mesh']['fsdp']
  )
  parts = config.train.accumulate_steps
  if images > parts:
    return f'raise train.accumulate_steps={parts}, up to {images}'
  return (
    f'raise mesh.fsdp={config.mesh.fsdp}, or lower train.batch_size='
    f'{config.train.batch_size} or loss.chunk_megabytes='
    f'{config.loss.chunk_megabytes:g}'
  )


def table(plan: dict[str, Any]) -> str:
  """Returns the plan as text."""
  lines = [
    f'{plan["topology"]}, {plan["devices"]} devices; numbers are per device'
  ]
  for name, p in plan['programs'].items():
    mesh = ' x '.join(f'{k} {v}' for k, v in p['mesh'].items())
    size = lambda key: _gigabytes(p[key])  # noqa: E731, B023
    rows = [
      ('fits', f'{"yes" if p["fits"] else "NO"}, {size("bytes_per_chip")} of '
       f'{size("memory")}'),
      ('arguments', size('arguments')),
      ('temporaries', size('temporaries')),
      ('outputs', size('outputs')),
      ('program', size('program')),
      ('TFLOPs a step', f'{p["flops"] / 1e12:.2f}'),
      ('memory traffic', f'{size("bytes_moved")}, loops counted once'),
    ]  # fmt: skip
    if 'classifier_share' in p:
      rows.append(('classifier', f'{p["classifier_share"]:.2%} of the FLOPs'))
    if 'points' in p:
      held = f'{size("points")} held beside these'
      rows.append(('points', held if p['points'] else 'read anew each pass'))
    for kind, c in (p['collectives'] or {}).items():
      rows.append((kind, f'{c["count"]:.0f}, {_gigabytes(c["bytes"])}'))
    rows.append((
      'seconds a step',
      f'{p["seconds_per_step"]:.3f} at {plan["utilisation"]:.0%} of the peak, '
      f'set by {p["bound"]}',
    ))  # fmt: skip
    if p['days']:
      rows.append(('days', f'{p["days"]:.1f} for {p["steps"]:,} steps'))
    if 'label_seconds' in p:
      rows.append(
        ('labels', f'{p["label_seconds"]:,.0f} s after the last pass')
      )
    if p['advice']:
      rows.append(('to make it fit', p['advice']))
    lines.append(f'{name}, mesh {mesh}')
    lines += [f'  {label:<15} {value}' for label, value in rows]
  return '\n'.join(lines)


def _gigabytes(size: float | None) -> str:
  """Returns a number of bytes in GiB as text."""
  if size is None or math.isnan(size):
    return 'unknown'
  return f'{size / 2**30:.2f} GiB'


def _define_flags() -> None:
  """Defines the flags of the command.

  They are not defined at import, since other commands define some of them too.
  """
  config_flags.DEFINE_config_file('config', None, 'configs/NAME.py')
  flags.DEFINE_string(
    'topology', None, 'TPU slice, such as v5e:16x16; one of mesh.slices.'
  )
  flags.DEFINE_bool('json', False, 'Print one JSON object.')
  flags.DEFINE_float(
    'utilisation', 0.5, 'Share of the peak FLOP/s that products reach.'
  )


if __name__ == '__main__':
  _define_flags()
  cli.run(main, required=('config', 'topology'), fields=fields.NAMES)
