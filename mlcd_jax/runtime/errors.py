"""The ways a run ends early, each with its exit code; `cli` prints it."""

import errno

# Of an OSError where there is no space left.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """The user's mistake: names the field or file, and the way out. Exit 2."""

  exit_code = 2


class RunError(Exception):
  """The run cannot go on for a reason outside its config. Exit 3."""

  exit_code = 3


class Stopped(Exception):
  """Stopped by a signal after saving; the same command continues. Exit 75."""

  exit_code = 75
