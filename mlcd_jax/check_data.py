"""Reads every image of a config's data once and lists the bad ones.

  python -m mlcd_jax.check_data --config=configs/vit_b16.py:webdataset \
    --config.data.path='data/*.tar'

It writes bad_keys.txt, with one key a line, into the workdir of that config:
runs/vit_b16_webdataset, or --workdir. A run in that workdir leaves these images
out. A run in another workdir needs --config.data.bad_keys=FILE.
"""

from concurrent import futures
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from mlcd_jax.config import fields
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors

_CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/NAME.py')
flags.DEFINE_string(
  'workdir', None, 'Where bad_keys.txt is written; runs/NAME if not given.'
)

# Images given to the threads at once. It bounds the memory for waiting tasks.
_CHUNK = 1_024


def main(rest: list[str]) -> None:
  """Checks the images and writes the list of bad keys."""
  if rest:
    raise errors.UserError(f'{rest[0]!r} is not a flag; they begin with --')
  path = cli.workdir() / 'bad_keys.txt'
  from mlcd_jax.config import check as config_check
  from mlcd_jax.runtime import files

  config_check.check(_CONFIG.value)
  try:  # An unwritable folder is found before hours of reading.
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
      f'--workdir={path.parent}: cannot be written ({e.strerror})'
    ) from e
  keys, found = find_bad(_CONFIG.value.data)
  with files.atomic(path) as temporary:
    temporary.write_bytes(b''.join(key + b'\n' for key in keys))
  print(f'{found.summary()}; {len(keys)} keys written to {path}')


def find_bad(data) -> tuple[list[bytes], Any]:
  """Decodes every image and returns the bad ones.

  Args:
    data: the `data` section of a config; its bad_keys are ignored.

  Returns:
    The keys of the images that cannot be decoded, in order, and the
    `problems.Problems` that counts them and the files that the source leaves
    out.
  """
  from mlcd_jax.data import sources
  from mlcd_jax.data import transforms
  from mlcd_jax.runtime import problems
  from mlcd_jax.runtime import progress as progress_lib

  data = data.copy_and_resolve_references()
  data.bad_keys = ''
  found = problems.Problems('check_data')
  source = sources.make(data, found=found)
  progress = progress_lib.Progress('check_data', len(source), unit='images')

  def check(index):
    try:
      transforms.decode(source[index]['image'])
    except transforms.BadImage as e:
      return index, str(e)

  bad = []
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(source), _CHUNK):
      chunk = range(len(source))[start : start + _CHUNK]
      bad += filter(None, pool.map(check, chunk))
      progress.update(chunk.stop)
  keys = source.keys()
  for index, reason in bad:
    found.add(keys[index].decode('utf-8', 'replace'), reason)
  return [bytes(keys[index]) for index, _ in bad], found


if __name__ == '__main__':
  cli.run(main, required=('config',), fields=fields.NAMES)
