"""The page's data as one HTML file that loads nothing."""

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
  """Returns the whole page.

  The data lies in it as JSON and reaches the document as text only. The
  policy allows these scripts and styles and images in place, and no
  connection.

  Args:
    data: JSON values; numbers that are not finite become null.
  """
  style = ''.join(map(_read, _STYLES))
  script = '"use strict";\n' + ''.join(map(_read, _SCRIPTS))
  content = json.dumps(_finite(data), allow_nan=False, separators=(',', ':'))
  # No tag can end or begin in it.
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
  return (importlib.resources.files(__package__) / name).read_text('utf-8')


def _digest(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return 'sha256-' + base64.b64encode(digest).decode('ascii')


def _finite(value: Any) -> Any:
  """The same with None for what JSON has no number for."""
  if isinstance(value, dict):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
