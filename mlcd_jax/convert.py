"""Converts weights from and to Hugging Face formats.

  python -m mlcd_jax.convert import SRC DST
  python -m mlcd_jax.convert export WORKDIR DST [--layout=open_clip]

`import` reads the vision tower of a `transformers` or OpenCLIP checkpoint or of
a run, and writes it in this project's format. SRC is a folder or
ORG/NAME[@REVISION]. `export` writes a trained run as a folder that
`transformers`, OpenCLIP or timm can load.
"""

from absl import flags

from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths
from mlcd_jax.weights import export
from mlcd_jax.weights import load as load_lib
from mlcd_jax.weights import open_clip
from mlcd_jax.weights.huggingface import from_huggingface

__all__ = ('from_huggingface', 'main')


def main(rest: list[str]) -> None:
  """Imports or exports weights, as the first argument says."""
  if len(rest) != 3 or rest[0] not in ('import', 'export'):
    raise errors.UserError(
      'convert: needs `import SRC DST` or `export WORKDIR DST`'
    )
  direction, source, target = rest[0], rest[1], paths.local(rest[2])
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise errors.UserError(f'{target}: exists already; name a new folder')
  if direction == 'import':
    load_lib.import_(source, target)
  else:
    export.export(source, target, layout=flags.FLAGS.layout)
  print(f'{target} written')


if __name__ == '__main__':
  flags.DEFINE_enum(
    'layout', 'transformers', open_clip.LAYOUTS, 'Of the exported folder.'
  )
  cli.run(main, required=())
