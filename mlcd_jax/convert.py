"""Hugging Face weights in and out.

  python -m mlcd_jax.convert import SRC DST
  python -m mlcd_jax.convert export WORKDIR DST [--layout=open_clip]

`import` reads a vision tower that `transformers` or OpenCLIP wrote, a folder or
ORG/NAME[@REVISION], or a run's, and writes it as this project keeps encoders.
`export` writes a trained run as a folder that `transformers`, OpenCLIP or timm
loads.
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
  """Converts one way or the other."""
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
