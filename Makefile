# One command each: `make run` serves, `make test` tests. Both set up what they need in .venv, from hashed lock files.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3.14 python3))
VENV ?= .venv
WORKERS ?= 3
SEED ?= 1
SIZE ?= 300
KILLS ?= 10
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test lint bench soak lock clean
run: $(VENV)/ready
	@exec $(VENV)/bin/tesapi serve

test: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadscope $(ARGS)

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --python-version 3.10 tesapi/runner
	$(VENV)/bin/lint-imports

bench: $(VENV)/ready-dev
	$(VENV)/bin/python -m benchmarks $(if $(filter command line environment,$(origin SIZE)),--size $(SIZE)) $(ARGS)

# The kill suite at the size that the issues name; SEED and SIZE say which run it was.
soak: $(VENV)/ready-dev
	TESAPI_TEST_FULL=1 TESAPI_TEST_AWAY_S=30 TESAPI_TEST_SIZE=$(SIZE) TESAPI_TEST_KILLS=$(KILLS) TESAPI_TEST_SEED=$(SEED) TESAPI_TEST_CANCELS=100 TESAPI_TEST_PRINTED_MB=5000 $(VENV)/bin/python -m pytest tests/services tests/runner -m soak -s -o timeout=3600

# Needs uv (`pip install uv`); run it after changing the dependencies in pyproject.toml.
lock:
	uv pip compile --universal --generate-hashes --no-emit-index-url --python-version 3.11 -q pyproject.toml --group build -o requirements.lock
	uv pip compile --universal --generate-hashes --no-emit-index-url --python-version 3.11 -q pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	uv pip compile --universal --generate-hashes --no-emit-index-url --python-version 3.11 -q tests/pulsar.in -o tests/pulsar.lock

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or newer, or say which with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=...)."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/ready: requirements.lock pyproject.toml | $(VENV)/bin/python
	@if [ ! -e $(VENV)/ready-dev ] || [ requirements.lock -nt $(VENV)/ready-dev ]; then \
	  echo "Setting up $(VENV), once ..."; \
	  $(VENV)/bin/python -m pip install --quiet --require-hashes -r requirements.lock && \
	  $(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .; fi
	@touch $@

$(VENV)/ready-dev: requirements-dev.lock pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) for development, once ..."
	@$(VENV)/bin/python -m pip install --quiet --require-hashes -r requirements-dev.lock
	@$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@
