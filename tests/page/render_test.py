"""The data as HTML that nothing in it can leave."""

import base64
import hashlib
import json
import re

from mlcd_jax.page import render

_EVIL = '</script><script>alert(1)</script><!-- & $title'


def parts(page, tag):
  return re.findall(rf'<{tag}[^>]*>(.*?)</{tag}>', page, re.DOTALL)


def test_text_is_inert_and_comes_back_whole():
  page = render.render({'title': _EVIL, 'caption': _EVIL, 'x': float('nan')})
  data, _ = parts(page, 'script')
  assert json.loads(data) == {'title': _EVIL, 'caption': _EVIL, 'x': None}
  assert '<' not in data and 'alert(1)<' not in page
  assert parts(page, 'title') == [
    '&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;!-- &amp; $title'
  ]


def test_policy_allows_only_what_is_in_the_page():
  page = render.render({'title': 'x'})
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
  assert "default-src 'none'" in policy and 'http' not in policy
  for kind, tag in (('style', 'style'), ('script', 'script')):
    digest = hashlib.sha256(parts(page, tag)[-1].encode()).digest()
    assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_page_names_no_other_place():
  # The namespace of SVG is a name that is never fetched.
  page = render.render({'title': 'x'})
  assert re.findall(r'https?://[^\'" ]*', page) == [
    'http://www.w3.org/2000/svg'
  ]
