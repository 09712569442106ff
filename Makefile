# `make demo` and `make test` set up all they need, in a virtual environment of their own
# (.venv-3.11 for Python 3.11). Another Python: `make test PYTHON=python3.12`.

PYTHON ?= python3.11
# Test processes. JAX uses several threads in each, so more than the cores does not help.
JOBS ?= 2
# More arguments for pytest: `make test ARGS="-k masks -x"`.
ARGS ?=
DEMO ?= --dataset digits --compare
# Some of the notebooks: `make notebooks NOTEBOOKS=1_quickstart`.
NOTEBOOKS ?=

# The interpreter and its version. Where only pyenv's shim is on PATH, the one of that name among
# pyenv's versions; python3 where nobody asked for a certain one.
FIND_PYTHON = for python in "$(PYTHON)" "$$(pyenv root 2>/dev/null)"/versions/*/bin/"$(PYTHON)" \
    $(if $(filter file,$(origin PYTHON)),python3); do \
    "$$python" -c 'import sys; print(sys.executable, "%d.%d" % sys.version_info[:2])' 2>/dev/null \
    && break; done
FOUND := $(shell $(FIND_PYTHON))
INTERPRETER := $(word 1,$(FOUND))
VERSION := $(word 2,$(FOUND))

VENV := .venv-$(or $(VERSION),none)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test notebooks lint format docs clean

help:  ## Print this list.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.bench  ## Train on digits, prune, and compare the methods.
	$(BIN)/python -m benchmarks.train $(DEMO)

test: lint  ## Lint, type check, and run the tests.
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

notebooks: $(VENV)/.notebooks  ## Execute the notebooks in their fast mode.
	-$(BIN)/python -c "from benchmarks import datasets; datasets.load('fashion_mnist')"  # else digits
	PRUNAX_FAST=1 $(BIN)/python colab/execute.py $(NOTEBOOKS)

lint: $(VENV)/.all  ## Check lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.all  ## Format, and mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## Build the documentation into site/, strictly.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## Remove environments, caches and build products.
	rm -rf .venv-[0-9n]* .cache .pytest_cache .ruff_cache .hypothesis build dist site
	find prunax tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An extra is installed once, and again when pyproject.toml changes, or the file that has the version.
$(VENV)/.bench $(VENV)/.notebooks $(VENV)/.docs $(VENV)/.all: $(VENV)/.%: pyproject.toml prunax/__init__.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(VERSION)" || { echo "make: cannot run '$(PYTHON)'. Pass a Python of 3.11 or later: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(INTERPRETER)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: prunax needs Python 3.11 or later, '$(PYTHON)' is $(VERSION)." >&2; exit 1; }
	"$(INTERPRETER)" -m venv $(VENV)
