"""Interleaves the processes of a run in its mesh, as slices of TPUs do.

Python imports it in a process whose PYTHONPATH has this folder. The devices
of two processes then lie in the order p0 p1 p0 p1, where CPUs would give
p0 p0 p1 p1, in which some mistakes cannot be seen.
"""

from jax.experimental import mesh_utils
import numpy as np


def _create_device_mesh(mesh_shape, devices, **_):
  processes = len({d.process_index for d in devices})
  by_process = np.array(devices).reshape(processes, -1)
  return by_process.T.reshape(mesh_shape)


mesh_utils.create_device_mesh = _create_device_mesh
