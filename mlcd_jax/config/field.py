"""The description of one config field."""

from typing import Any
from typing import NamedTuple

# The stages whose files may depend on a field.
EMBED, CLUSTER, TRAIN, EVALUATE = 'embed', 'cluster', 'train', 'evaluate'

MOST = 2**31 - 1  # The largest int32; as an upper end it means no limit.


class Field(NamedTuple):
  """A row of the table of fields.

  Attributes:
    name: the dotted name, such as loss.margin.
    default: the default value, which also sets the type.
    text: the effect of the field, with its unit.
    low: the smallest value, or None for no range.
    high: the largest value.
    choices: the allowed values, or () for any value.
    stages: the stages whose files depend on the field. A field without stages
      changes only memory, speed, logs or how often something is saved.
  """

  name: str
  default: Any
  text: str
  low: float | None = None
  high: float | None = None
  choices: tuple[str, ...] = ()
  stages: tuple[str, ...] = ()
