"""One config field: all that is said of it anywhere."""

from typing import Any
from typing import NamedTuple

# The stages whose files may depend on a field.
EMBED, CLUSTER, TRAIN, EVALUATE = 'embed', 'cluster', 'train', 'evaluate'

MOST = 2**31 - 1


class Field(NamedTuple):
  """A row of the table of fields.

  Attributes:
    name: dotted, such as loss.margin.
    default: value, which also fixes the type.
    text: what the field does, with its unit.
    low: smallest value; None = no range.
    high: largest value.
    choices: the values it may have; () = any.
    stages: whose files depend on it. A field with none changes only memory,
      speed, logs or how often something is saved.
  """

  name: str
  default: Any
  text: str
  low: float | None = None
  high: float | None = None
  choices: tuple[str, ...] = ()
  stages: tuple[str, ...] = ()
