# make demo | test | test-slow | lint | docs | audit | lock
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: demo test test-slow lint docs audit lock

# glibc then asks for huge pages, which saves a step's page faults.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: .venv/installed
	@launch/demo.sh $(SEED)

# In two processes, each of eight fake devices; tests of a file stay together.
test: .venv/installed-test
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile

# Whole runs, killed and stopped; the report in Chromium, which is installed
# where that is allowed. First what two processes of tests may share the cores
# for, then, one by one, what waits for other processes only so long. Programs
# are optimized as users' are: without XLA_FLAGS, see tests/conftest.py.
test-slow: export XLA_FLAGS :=
test-slow: .venv/installed-test
	@command -v chromium > /dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get update && apt-get install -y --no-install-recommends chromium; } \
	  || echo 'no Chromium: the tests of report.html are skipped' >&2
	$(BIN)/python -m pytest -q -rs -m 'slow and not alone' -n 2 --dist loadfile
	$(BIN)/python -m pytest -q -rs -m 'slow and alone'

# docs/config.md from the fields, docs/api/index.html from the docstrings; two commands whose flags have the
# same names cannot be imported together.
docs: .venv/installed-docs
	$(BIN)/python -c 'from mlcd_jax.config import fields; print(fields.page(), end="")' > docs/config.md
	$(BIN)/pdoc --docformat google --output-directory docs/api \
	  mlcd_jax '!mlcd_jax.main' '!mlcd_jax.check_data'

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known vulnerabilities of the pinned packages; what cannot be looked up fails.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt

# Writes requirements.txt anew from pyproject.toml.
lock:
	{ echo '# What pyproject.toml asks for, locked for Python 3.11 to 3.13 (`make lock`).'; \
	  uv pip compile --quiet --universal --python-version 3.11 \
	    --fork-strategy fewest --no-header --no-annotate pyproject.toml; \
	} > requirements.lock && mv requirements.lock requirements.txt

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: $(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	@touch $@

.venv/installed-docs: requirements-docs.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	@touch $@
