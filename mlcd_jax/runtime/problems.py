"""Bad input, counted by reason and reported by key.

What only does not belong to the images, such as hidden files, is counted
apart: it is left out, and not bad.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import logging

from mlcd_jax.runtime import errors

_log = logging.getLogger(__name__)

_LOGGED = 20  # Keys that are logged one by one; after that only the count.
_EXAMPLES = 3  # Keys named in an error.


class Problems:
  """Counts what cannot be used; logs the first keys, then only counts.

  Attributes:
    counts: reason -> how many are bad.
    examples: the first few, as 'key (reason)'.
    left_out: reason -> how many were not taken without being bad.
  """

  def __init__(self, stage: str):
    """`stage` begins every logged line."""
    self.counts = collections.Counter()
    self.examples = []
    self.left_out = collections.Counter()
    self._stage = stage

  @property
  def total(self) -> int:
    """All that are bad."""
    return self.counts.total()

  def add(self, key: str, reason: str, count: int = 1) -> None:
    """Counts `reason` for an image or file, `count` times."""
    before = self.total
    self.counts[reason] += count
    if len(self.examples) < _EXAMPLES:
      self.examples.append(f'{key} ({reason})')
    if before < _LOGGED:
      _log.warning('%s: %s: %s', self._stage, key, reason)
      if self.total >= _LOGGED:
        _log.warning('%s: from here on they are only counted', self._stage)

  def leave_out(self, reason: str, count: int = 1) -> None:
    """Counts what was not taken and is not bad, without logging it."""
    if count:
      self.left_out[reason] += count

  def merge(self, counts: Mapping[str, int], examples: Sequence[str]) -> None:
    """Adds what another one counted, without logging it again."""
    self.counts.update(counts)
    self.examples = [*self.examples, *examples][:_EXAMPLES]

  def summary(self) -> str:
    """Returns '3 bad (2 empty, 1 undecodable), 1 left out (1 other file)'."""
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
    """Raises UserError with examples where too many of the images are bad.

    Args:
      num_images: good and bad.
      max_bad_fraction: data.max_bad_fraction.
      way_out: what the user can do.
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
  return ', '.join(f'{n} {r}' for r, n in counts.most_common())
