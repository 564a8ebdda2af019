"""Counts of bad images and files, by reason.

Files that are not images, such as notes beside them, are counted separately as
left out. They are not bad.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import logging

from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

# The first keys are logged one by one. After them bad images are only counted,
# so that broken data does not flood the log.
_LOGGED = 20
_EXAMPLES = 3  # Keys that an error names.


class Problems:
  """A counter of bad images and files that logs the first of them.

  Attributes:
    counts: the number of bad images or files, by reason.
    examples: the first few of them, as 'key (reason)'.
    left_out: the number of files that were left out and are not bad, by reason.
  """

  def __init__(self, stage: str):
    """Creates an empty counter; log lines begin with `stage`."""
    self.counts = collections.Counter()
    self.examples = []
    self.left_out = collections.Counter()
    self._stage = stage

  @property
  def total(self) -> int:
    """Returns the number of bad images and files."""
    return self.counts.total()

  def add(self, key: str, reason: str, count: int = 1) -> None:
    """Counts a bad image or file.

    Args:
      key: the key of the image or the path of the file.
      reason: the reason, which groups the counts.
      count: the number of images that this key stands for.
    """
    before = self.total
    self.counts[reason] += count
    if len(self.examples) < _EXAMPLES:
      self.examples.append(f'{key} ({reason})')
    if before < _LOGGED:
      _log.warning('%s: %s: %s', self._stage, key, reason)
      if self.total >= _LOGGED:
        _log.warning('%s: from here on they are only counted', self._stage)

  def leave_out(self, reason: str, count: int = 1) -> None:
    """Counts files that are left out but not bad; logs nothing."""
    if count:
      self.left_out[reason] += count

  def merge(self, counts: Mapping[str, int], examples: Sequence[str]) -> None:
    """Adds another counter's counts and examples; logs nothing."""
    self.counts.update(counts)
    self.examples = [*self.examples, *examples][:_EXAMPLES]

  def summary(self) -> str:
    """Returns the counts as one line.

    Example: '3 bad (2 empty, 1 undecodable), 1 left out (1 other file)'.
    """
    parts = [f'{self.total} bad']
    if self.total:
      parts[0] += f' ({_reasons(self.counts)})'
    if self.left_out:
      parts.append(
        f'{self.left_out.total()} left out ({_reasons(self.left_out)})'
      )
    return ', '.join(parts)

  def check(
    self,
    num_images: int,
    max_bad_fraction: float,
    way_out: str = 'python -m mlcd_jax.check_data lists them all, to be left '
    'out',
  ) -> None:
    """Checks that not too many images are bad.

    Args:
      num_images: the number of images, good and bad.
      max_bad_fraction: the config field data.max_bad_fraction.
      way_out: the last sentence of the error, which tells the user what to do.

    Raises:
      UserError: the bad fraction is larger; the message has examples.
    """
    if self.total <= max_bad_fraction * num_images:
      return
    raise errors.UserError(
      f'data.path: {self.total} of {num_images} images are bad '
      f'({_reasons(self.counts)}), such as '
      + ', '.join(self.examples)
      + f', more than data.max_bad_fraction={max_bad_fraction} allows. '
      + way_out
    )


def _reasons(counts: collections.Counter) -> str:
  """Returns counts as text, the most frequent reason first."""
  return ', '.join(f'{n} {r}' for r, n in counts.most_common())
