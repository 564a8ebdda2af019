"""Prompts for zero-shot classification: class names and sentence templates.

assets/prompts.json has CLIP's public prompts by data set. Users may give a file
of their own in the same form:
{"NAME": {"classes": [...], "templates": ["a photo of a {c}."]}}.
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
  """Returns the sentences of every class, the same number for each.

  Args:
    name: an entry of prompts.json, or FILE:NAME for an entry of another file.
    class_names: the class names of the data set, used if the entry has none.
    num_classes: the number of classes that the data set has.
    field: the config field of the name, for errors.

  Raises:
    UserError: the entry does not exist, cannot be read, has no template, or
      has another number of classes.
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
  """Returns the names of the entries of prompts.json."""
  return list(_content(''))


def _content(path: str) -> dict[str, dict[str, list[str]]]:
  """Returns all entries of a file; '' reads prompts.json."""
  own = importlib.resources.files('mlcd_jax') / 'assets/prompts.json'
  file = paths.local(path) if path else own
  return json.loads(file.read_text())


def _entry(name: str, field: str) -> dict[str, list[str]]:
  """Returns the `classes` and `templates` of an entry; see `sentences`."""
  # The last colon separates, since the path of the file may have others.
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
  """Returns a class name in words.

  SUN397's names begin with their first letter between slashes, as in
  /a/airplane_cabin, which becomes "airplane cabin".
  """
  return re.sub('[_/]', ' ', re.sub('^/./', '', name))
