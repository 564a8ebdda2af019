"""Peak FLOP/s, memory and bandwidth of known accelerators."""

from collections.abc import Iterable
import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's limits as its maker states them.

  Attributes:
    flops: the peak FLOPs a second in bfloat16, without sparsity.
    memory: the bytes of device memory.
    bandwidth: the bytes a second that this memory reads and writes.
  """

  flops: float
  memory: float
  bandwidth: float


# Keys are prefixes of jax.Device.device_kind; the first match counts, so longer
# prefixes stand first. TPUs: the tables of cloud.google.com/tpu/docs. GPUs:
# NVIDIA's data sheets, SXM modules.
_CHIPS = {
  'TPU v4': Chip(275e12, 32 * 2**30, 1.2e12),
  'TPU v5 lite': Chip(197e12, 16 * 2**30, 819e9),
  'TPU v5': Chip(459e12, 95 * 2**30, 2.765e12),
  'TPU v6 lite': Chip(918e12, 32 * 2**30, 1.64e12),
  'TPU7x': Chip(2307e12, 192 * 2**30, 7.37e12),
  'NVIDIA A100-SXM4-40GB': Chip(312e12, 40e9, 1.555e12),
  'NVIDIA A100': Chip(312e12, 80e9, 2.039e12),
  'NVIDIA H100': Chip(989e12, 80e9, 3.35e12),
  'NVIDIA H200': Chip(989e12, 141e9, 4.8e12),
}


def find(device_kind: str, *, devices_per_chip: int = 1) -> Chip | None:
  """Returns the part of a chip that one device has.

  Args:
    device_kind: the name that jax.Device gives.
    devices_per_chip: the number of devices that share the chip.

  Returns:
    The chip's limits divided by `devices_per_chip`, or None if the chip is not
    in the table.
  """
  for name, chip in _CHIPS.items():
    if device_kind.startswith(name):
      return Chip(*(x / devices_per_chip for x in dataclasses.astuple(chip)))
  return None


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
  """Returns the peak bfloat16 FLOPs a second of all devices together.

  It is None if one of the devices is not in the table.
  """
  chips = [find(device.device_kind) for device in devices]
  return None if None in chips else sum(chip.flops for chip in chips)
