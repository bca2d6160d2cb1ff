# `make quickstart` and `make test` need nothing but make, a compiler and Python 3.10 to 3.13.

PYTHON ?= python3.13 python3.12 python3.11 python3.10 python3
VENV ?= .venv
JOBS ?= 2

STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile

.PHONY: quickstart test test-slow lint types clean

quickstart: $(STAMP)
	$(VENV)/bin/supernet-search experiment=quickstart

test: $(STAMP)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .

types: $(STAMP)
	mkdir -p build/types && ln -sfn ../../scripts build/types/supernet_scripts
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# bin/pip is the last thing that venv makes: without it an interrupted environment is made again.
$(VENV)/bin/pip:
	@for python in $(PYTHON); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.10 to 3.13 with the venv module among: $(PYTHON)." \
	  "Name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

$(STAMP): setup.cfg pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@
