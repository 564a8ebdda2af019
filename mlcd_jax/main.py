"""Runs the stages: embed, cluster, train, evaluate.

  python -m mlcd_jax.main --config=configs/quickstart.py

It writes everything to runs/quickstart, or to --workdir=DIR. A flag sets a
config field, such as --config.train.batch_size=64. The preset of a config
follows a colon: --config=configs/vit_b16.py:laion400m writes to
runs/vit_b16_laion400m. Run the same command again to continue a stopped run.
"""

from absl import flags
from ml_collections import config_flags

from mlcd_jax.config import fields
from mlcd_jax.runtime import cli
from mlcd_jax.runtime import errors

_CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/NAME.py')
flags.DEFINE_string(
  'workdir', None, 'Where everything is written; runs/NAME if not given.'
)
_STAGES = flags.DEFINE_list(
  'stages', None, 'Some of embed,cluster,train,evaluate; all if not given.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of process 0.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is.')
_INIT_TIMEOUT = flags.DEFINE_integer(
  'init_timeout', 300, 'Seconds to wait for the other processes.'
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout', 100, 'Seconds until a silent process counts as lost.'
)


def main(rest: list[str]) -> None:
  """Joins the other processes and runs the stages."""
  if rest:
    raise errors.UserError(f'{rest[0]!r} is not a flag; they begin with --')
  workdir = cli.workdir()
  # jax loads slowly. Importing it here keeps --help and flag errors fast.
  from mlcd_jax import stages
  from mlcd_jax.runtime import distributed

  distributed.initialize(
    coordinator_address=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    init_timeout=_INIT_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  )
  stages.run(
    _CONFIG.value,
    workdir,
    stages.STAGES if _STAGES.value is None else _STAGES.value,
    preset=_preset(),
  )
  distributed.shutdown()


def _preset():
  """Returns --config as given and its fields without other flags' overrides."""
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  fresh = flags.FlagValues()
  preset = config_flags.DEFINE_config_file('config', flag_values=fresh)
  fresh(['', f'--config={name}'])
  return name, preset.value


if __name__ == '__main__':
  cli.run(main, required=('config',), fields=fields.NAMES)
