"""`make audit`, with a service of the test's own that knows vulnerabilities."""

import contextlib
import http.server
import json
import os
import subprocess
import threading

from packaging import requirements
from packaging import utils
import pytest

from tests import commands


@contextlib.contextmanager
def service(vulnerable):
  """A server as OSV's; yields its URL and the (name, version) it was asked."""
  asked = set()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      query = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      package = query['package']
      asked.add((package['name'], query['version']))
      known = {'id': 'TEST-1', 'affected': [{'package': package}]}
      answer = {'vulns': [known]} if package['name'] == vulnerable else {}
      content = json.dumps(answer).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/v1/query', asked
    server.shutdown()


def audit(url):
  return subprocess.run(
    ['make', 'audit'],
    cwd=commands.ROOT,
    env=os.environ
    | {'PIP_AUDIT_VULNERABILITY_SERVICE': 'osv', 'PIP_AUDIT_OSV_URL': url},
    capture_output=True,
    text=True,
  )


def pins():
  """Name and version of all that requirements.txt installs here."""
  lines = (commands.ROOT / 'requirements.txt').read_text().splitlines()
  found = map(
    requirements.Requirement,
    (line for line in lines if line and not line.startswith('#')),
  )
  return {
    (utils.canonicalize_name(pin.name), str(pin.specifier).removeprefix('=='))
    for pin in found
    if pin.marker is None or pin.marker.evaluate()
  }


@pytest.mark.slow
def test_every_pin_is_looked_up():
  with service(vulnerable=None) as (url, asked):
    done = audit(url)
  assert done.returncode == 0, done.stderr
  assert asked == pins()


@pytest.mark.slow
def test_a_vulnerable_pin_fails():
  with service(vulnerable='pillow') as (url, _):
    done = audit(url)
  assert done.returncode != 0
  assert 'pillow' in done.stdout and 'TEST-1' in done.stdout


@pytest.mark.slow
def test_no_answer_fails():
  done = audit(f'http://127.0.0.1:{commands.free_port()}/v1/query')
  assert done.returncode != 0
