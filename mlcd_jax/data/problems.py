"""Bad input, counted by reason and reported by key."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import logging

from mlcd_jax import errors

_log = logging.getLogger(__name__)

_LOGGED = 20  # Keys that are logged one by one; after that only the count.
_EXAMPLES = 3  # Keys named in an error.


class Problems:
  """Counts what cannot be used; logs the first keys, then only counts.

  Attributes:
    counts: reason -> how many.
    examples: the first few, as 'key (reason)'.
  """

  def __init__(self, stage: str):
    """`stage` begins every logged line."""
    self.counts = collections.Counter()
    self.examples = []
    self._stage = stage

  @property
  def total(self) -> int:
    """All reasons together."""
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

  def merge(self, counts: Mapping[str, int], examples: Sequence[str]) -> None:
    """Adds what another one counted, without logging it again."""
    self.counts.update(counts)
    self.examples = [*self.examples, *examples][:_EXAMPLES]

  def summary(self) -> str:
    """Returns '3 bad (2 empty, 1 undecodable)'."""
    return f'{self.total} bad' + (f' ({self._reasons()})' if self.total else '')

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
      f'({self._reasons()}), such as '
      + ', '.join(self.examples)
      + f', more than data.max_bad_fraction={max_bad_fraction} allows. '
      + way_out
    )

  def _reasons(self) -> str:
    return ', '.join(f'{n} {r}' for r, n in self.counts.most_common())
