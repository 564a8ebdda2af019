"""Weights by name, from a hub that runs on this machine for the test."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
CLIP = ROOT / 'tests/goldens/clip_bf16'
COMMIT = '0123456789abcdef0123456789abcdef01234567'


class _Hub(http.server.BaseHTTPRequestHandler):
  """What huggingface_hub asks for one model of one commit."""

  def __init__(self, asked, *args):
    self._asked = asked
    super().__init__(*args)

  def do_HEAD(self):
    self._answer(body=False)

  def do_GET(self):
    self._answer(body=True)

  def _answer(self, *, body):
    path = self.path.partition('?')[0]
    self._asked.append(path)
    names = sorted(p.name for p in CLIP.iterdir())
    name = path.rpartition('/')[2]
    if path.startswith('/api/models/org/name/tree/'):
      files = [
        {'type': 'file', 'path': n, 'size': 1, 'oid': '0'}
        for n in [*names, 'pytorch_model.bin']
      ]
      content = json.dumps(files).encode()
    elif path.startswith('/api/models/org/name/revision/'):
      files = [{'rfilename': n} for n in [*names, 'pytorch_model.bin']]
      found = {'id': 'org/name', 'sha': COMMIT, 'siblings': files}
      content = json.dumps(found).encode()
    elif path.startswith('/org/name/resolve/') and name in names:
      content = (CLIP / name).read_bytes()
    else:
      self.send_response(404)
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    self.send_response(200)
    self.send_header('Content-Length', str(len(content)))
    self.send_header('X-Repo-Commit', COMMIT)
    self.send_header('ETag', f'"{hashlib.sha1(content).hexdigest()}"')
    self.end_headers()
    if body:
      self.wfile.write(content)

  def log_message(self, *args):
    del args


@pytest.fixture(name='hub')
def fixture_hub():
  """The hub's URL, and the paths it was asked for."""
  asked = []
  server = http.server.ThreadingHTTPServer(
    ('127.0.0.1', 0), functools.partial(_Hub, asked)
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}', asked
  server.shutdown()
  server.server_close()


def test_a_name_is_downloaded_and_its_commit_kept(hub, tmp_path):
  url, asked = hub

  def import_(source, target):
    return subprocess.run(
      [sys.executable, '-m', 'mlcd_jax.convert', 'import', source, target],
      cwd=ROOT,
      env=os.environ
      | {'HF_ENDPOINT': url, 'HF_HUB_CACHE': str(tmp_path / 'cache')},
      capture_output=True,
      text=True,
    )

  done = import_('org/name', tmp_path / 'a')
  assert done.returncode == 0, done.stderr
  assert f'org/name@{COMMIT} pins it' in done.stderr
  made = json.loads((tmp_path / 'a/model.json').read_text())
  assert made['source'] == f'org/name@{COMMIT}'
  assert (tmp_path / 'a/params/block_01.safetensors').is_file()
  # Pickles, and files that are of no use here, are not even fetched.
  fetched = {path.rpartition('/')[2] for path in asked}
  assert 'config.json' in fetched
  assert not fetched & {'pytorch_model.bin', 'golden.npz'}
  done = import_('org/other', tmp_path / 'b')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: SRC=org/other: no')
