"""Errors that end a run early, each with its own exit code.

`cli` prints their message as one line and exits with their code.
"""

import errno

# Values of OSError.errno that mean that the disk or the quota is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """A mistake of the user; the message names it and the fix. Exit code 2."""

  exit_code = 2


class RunError(Exception):
  """A failure that the config did not cause, such as a full disk. Exit 3."""

  exit_code = 3


class Stopped(Exception):
  """A stop by a signal; the same command continues the run. Exit code 75."""

  exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later.
