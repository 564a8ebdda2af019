"""Studies: a run of mlcd_jax for every cell of a grid over config fields.

  python benchmarks/study.py --study=digits_positives,digits_classes

The grids are in studies.py. Every cell is a run in a folder of its own in
--workdir; embeddings and clusters are made once where the config allows. The
results go into WORKDIR/study.json, whose records are not run again, and from it
tables and plots are made (study_tables.py). The same command again goes on
after a stop. Started several times, on one machine or on several that share
the workdir, the processes share the cells.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import flags

from benchmarks import studies
from benchmarks import study_runs
from benchmarks import study_tables
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors

_STUDY = flags.DEFINE_list(
  'study', list(studies.STUDIES), 'Some of studies.py; all if not given.'
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/study', 'Of all the runs.')
_DATA = flags.DEFINE_string(
  'data', 'emoji', 'Where noto.tar and fluent.tar are.'
)

_log = logging.getLogger('mlcd_jax.study')


def main(rest: list[str]) -> None:
  """Runs what is not in study.json yet, then writes tables and plots."""
  if rest:
    raise errors.UserError(f'{rest[0]!r} is not a flag; they begin with --')
  for name in _STUDY.value:
    if name not in studies.STUDIES:
      raise errors.UserError(
        f'--study: {name!r} is unknown; use any of: '
        + ', '.join(studies.STUDIES)
      )
  runs = study_runs.Runs(pathlib.Path(_WORKDIR.value), _DATA.value)
  for name in _STUDY.value:
    for cell in study_runs.cells(name, studies.STUDIES[name]):
      if not runs.run(cell):
        _log.info('study: %s is run elsewhere', cell)
  study_tables.write(runs.records(), runs.path.parent)


if __name__ == '__main__':
  cli.run(main, required=())
