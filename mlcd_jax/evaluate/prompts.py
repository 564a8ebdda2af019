"""Class names and the sentences they are put into.

assets/prompts.json has CLIP's public ones by data set; a file of the same form
is as good: {"NAME": {"classes": [...], "templates": ["a photo of a {c}."]}}.
"""

from collections.abc import Sequence
import importlib.resources
import json
import re

from mlcd_jax.runtime import errors
from mlcd_jax.runtime import paths


def sentences(
  name: str, class_names: Sequence[str], num_classes: int, *, field: str
) -> list[list[str]]:
  """Returns the sentences of every class, as many for each.

  Args:
    name: an entry of prompts.json, or FILE:NAME with a file of one's own.
    class_names: of the data set, where the entry has none.
    num_classes: that there must be.
    field: what to call the name in errors.

  Raises:
    UserError: there is no such entry, or its classes are others.
  """
  entry = _entry(name, field)
  classes = entry['classes'] or [_readable(c) for c in class_names]
  if len(classes) != num_classes:
    raise errors.UserError(
      f'{field}={name}: {len(classes)} class names for {num_classes} classes; '
      'name them in a file of your own, FILE:NAME'
    )
  return [
    [template.replace('{c}', c) for template in entry['templates']]
    for c in classes
  ]


def known() -> list[str]:
  """Returns the entries of prompts.json."""
  return list(_content(''))


def _content(path: str) -> dict[str, dict[str, list[str]]]:
  """All entries of a file; '' = of prompts.json."""
  own = importlib.resources.files('mlcd_jax') / 'assets/prompts.json'
  file = paths.local(path) if path else own
  return json.loads(file.read_text())


def _entry(name: str, field: str) -> dict[str, list[str]]:
  path, _, own = name.rpartition(':')
  try:
    content = _content(path)
  except (OSError, ValueError) as e:
    raise errors.UserError(f'{field}={name}: cannot be read ({e})') from e
  if not isinstance(content, dict) or own not in content:
    raise errors.UserError(
      f'{field}={name}: no such entry; there are ' + ', '.join(content)
    )
  entry = {'classes': [], 'templates': []} | content[own]
  if not any('{c}' in t for t in entry['templates']):
    raise errors.UserError(
      f'{field}={name}: needs "templates" with {{c}} for the class'
    )
  return entry


def _readable(name: str) -> str:
  """A class's name as one would say it; SUN397's begin with /a/ and so on."""
  return re.sub('[_/]', ' ', re.sub('^/./', '', name))
