"""Who may import whom, as CONTRIBUTING's map says."""

import pathlib

ROOT = pathlib.Path(__file__).parent.parent / 'mlcd_jax'

# What each room may import, beside itself. Rooms that are not here are
# commands and `stages`, which see all.
ALLOWED = {
  'runtime': {'losses': 0} and set(),
}
