"""OpenBLAS at its best, to be set before NumPy and its peers load it."""

import os
import pathlib


def set_core_type() -> None:
  """Chooses the kernels where releases in wheels would choose slow ones.

  The OpenBLAS that some wheels carry does not know AMD's processors with
  AVX-512 and falls to kernels a fourth as fast; SkylakeX has AVX-512's. The
  others are known, and without AVX-512 those kernels would crash.
  """
  os.environ.pop('OPENBLAS_L2_SIZE', None)
  os.environ.pop('OPENBLAS_CORETYPE', None)
  cpu = pathlib.Path('/proc/cpuinfo')
  text = cpu.read_text() if cpu.exists() else ''
  if 'AuthenticAMD' in text and ' avx512f ' in text:
    os.environ['OPENBLAS_CORETYPE'] = 'SkylakeX'
