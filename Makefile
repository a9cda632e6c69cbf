# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
RUN := $(VENV)/bin/python

.PHONY: help demo test check lint format types clean

help:  ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile

demo: $(VENV)/.base  ## Align a tiny model on generated pairs: CPU, no network, under two minutes.
	$(RUN) -m jaxdpo.train

test: $(VENV)/.test  ## Run the quick tests.
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 4

check: lint types test  ## Lint, format, types and tests: what a change must pass.

lint: $(VENV)/.dev  ## Look for mistakes and unformatted files.
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.dev  ## Format the files and mend what can be mended.
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.dev  ## Check the types.
	$(RUN) -m pyright --pythonpath $(RUN)

clean:  ## Remove the environment and what the tools left.
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxdpo needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that an environment is brought up to date when pyproject.toml changes.
$(VENV)/.base: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@
