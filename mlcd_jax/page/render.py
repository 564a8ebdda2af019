"""Rendering of the page's data as one HTML file that loads nothing."""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import string
from typing import Any

_STYLES = ('page.css',)
_SCRIPTS = ('dom.js', 'charts.js', 'page.js')


def render(data: dict[str, Any]) -> str:
  """Returns the HTML of the whole page.

  The data is embedded as JSON, and the scripts show it only as text, so that
  no caption or key can act as markup. The content security policy allows only
  the embedded script, style and images, and no connection.

  Args:
    data: the data of the page, made of JSON types. Numbers that are not finite
      become null.
  """
  style = ''.join(map(_read, _STYLES))
  script = '"use strict";\n' + ''.join(map(_read, _SCRIPTS))
  content = json.dumps(_finite(data), allow_nan=False, separators=(',', ':'))
  # JSON allows these escapes. Without the characters, a caption with
  # "</script>" cannot end the element.
  for character in '<>&':
    content = content.replace(character, f'\\u{ord(character):04x}')
  return string.Template(_read('page.html')).substitute(
    title=html.escape(data['title']),
    policy=(
      "default-src 'none'; base-uri 'none'; form-action 'none'; "
      f"img-src data:; style-src '{_digest(style)}'; "
      f"script-src '{_digest(script)}'"
    ),
    style=style,
    script=script,
    data=content,
  )


def _read(name: str) -> str:
  """Returns the text of a file in this package."""
  return (importlib.resources.files(__package__) / name).read_text('utf-8')


def _digest(text: str) -> str:
  """Returns the hash by which the content security policy allows a text."""
  digest = hashlib.sha256(text.encode()).digest()
  return 'sha256-' + base64.b64encode(digest).decode('ascii')


def _finite(value: Any) -> Any:
  """Returns a copy in which NaN and infinities are None; JSON has neither."""
  if isinstance(value, dict):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
