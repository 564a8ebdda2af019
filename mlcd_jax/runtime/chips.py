"""What known accelerators can do: peak FLOPs, memory and bandwidth."""

from collections.abc import Iterable
import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip as its maker states it.

  Attributes:
    flops: a second in bfloat16, dense.
    memory: bytes.
    bandwidth: bytes a second from and to that memory.
  """

  flops: float
  memory: float
  bandwidth: float


# The first name that a jax.Device's device_kind begins with. TPUs: the tables
# of cloud.google.com/tpu/docs; GPUs: NVIDIA's data sheets, SXM modules.
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
  """Returns a device's share of its chip, or None where it is not known."""
  for name, chip in _CHIPS.items():
    if device_kind.startswith(name):
      return Chip(*(x / devices_per_chip for x in dataclasses.astuple(chip)))
  return None


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
  """FLOPs a second of all devices in bfloat16; None where not known."""
  chips = [find(device.device_kind) for device in devices]
  return None if None in chips else sum(chip.flops for chip in chips)
