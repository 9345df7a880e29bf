# From a clean checkout: `make generate PROMPT="red heart"` and `make test`. `make help` lists the rest.
#
# PYTHON      interpreter that .venv is made from (found if not given; 3.11 or newer)
# PIP_ARGS    added to every pip install
# TORCH_ARGS  added to the install of torch alone, e.g. to choose its CPU build (CONTRIBUTING.md, "Which torch")
# ARGS        added to `sfumato generate` (make generate), to pytest (make test, make test-slow), and to the
#             benchmark (make bench-train)
# WORKERS     processes that pytest uses

PYTHON ?=
PIP_ARGS ?=
TORCH_ARGS ?=
ARGS ?=
WORKERS ?= 2
PROMPT := red heart

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Workers times torch threads stays at the number of workers, or they would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# As it was typed, a dollar sign too, and to the shell as one word whatever is in it.
override PROMPT := $(value PROMPT)
export PROMPT

.DELETE_ON_ERROR:
.PHONY: help generate test test-slow bench-train lint format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST)

generate: $(VENV)/.installed  ## PROMPT="red heart": write a picture and print its path
	@$(BIN)/sfumato generate "$$PROMPT" $(ARGS)

test: lint  ## ruff, mypy and the fast tests
	$(PYTEST) -q -n $(WORKERS) $(ARGS)

test-slow: $(VENV)/.installed-dev  ## the tests that take minutes
	$(PYTEST) -q -n $(WORKERS) -m slow $(ARGS)

bench-train: $(VENV)/.installed-dev  ## speed and memory of training beside others, on a quiet machine
	$(BIN)/python benchmarks/train.py $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy, nothing changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv, caches and build results
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment, made from the first interpreter that is new enough.
$(VENV)/.created:
	@for python in $(PYTHONS); do \
	  if "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "sfumato needs Python 3.11 or newer, tried: $(PYTHONS); install one or name it: make PYTHON=/path/to/python3" >&2; exit 2; \
	fi; \
	echo "creating $(VENV) from $$found" >&2; \
	"$$found" -m venv --clear $(VENV) || { echo "$$found cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 2; }
	@touch $@

# torch first and alone: what follows finds it installed, so no second build of it is ever resolved or fetched.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing sfumato into $(VENV); torch is a few hundred megabytes" >&2
	@$(PIP) $(TORCH_ARGS) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)" >&2
	@$(PIP) --editable '.[dev]'
	@touch $@
