# Everything a person types: `make demo`, `make test`, `make lint`. Needs Python 3.11 or later.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first of these that is new enough; `make PYTHON=/path/to/python3.12 …` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Several torch processes share the cores in tests; with a thread per core each they wait for another.
ONE_THREAD := OMP_NUM_THREADS=1
# Tests run in so many processes, a file in one of them.
TEST_PROCESSES ?= 2
PORT ?= 8000
DEMO_DATA ?= demo-data

.PHONY: help install demo stop-demo test browser test-slow lint encoders docs clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## Make .venv and install ctune into it, if pyproject.toml changed.

$(INSTALLED): pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(NEW_ENOUGH)'; then \
		echo "ctune needs Python 3.11 or later; found none. Install one, or: make PYTHON=PATH …" >&2; \
		exit 1; \
	fi
	@if [ ! -x $(BIN)/python ]; then \
		$(PYTHON) -m venv $(VENV) || { \
			rm -rf $(VENV); \
			echo "$(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)" >&2; \
			exit 1; }; \
	fi
	@echo "Installing ctune into $(VENV); PyTorch is large, the first time takes minutes …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -W ignore -c 'import torch, torchvision' || { \
		echo "torch and torchvision do not fit together (see the error above). They must come from" >&2; \
		echo "the same index: $(BIN)/pip uninstall -y torch torchvision, then run make again with" >&2; \
		echo "one index in force (PIP_INDEX_URL), or install a matching pair by hand first." >&2; \
		exit 1; }
	@touch $(INSTALLED)

demo: $(INSTALLED) ## Start ctune here and run examples/digits.py on it; the service goes on running.
	@url=$$($(BIN)/ctune up --detach --data-dir $(DEMO_DATA) --port $(PORT)) && \
	$(BIN)/python examples/digits.py --url "$$url" && \
	echo && echo "ctune goes on running at $$url (docs: $$url/docs). Stop it: make stop-demo"

stop-demo: ## Stop the service that `make demo` left running.
	@if [ -x $(BIN)/ctune ]; then $(BIN)/ctune down --data-dir $(DEMO_DATA); fi

test: $(INSTALLED) ## Run all tests but the slow ones.
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(INSTALLED) ## Run the slow tests.
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow

browser: ## Install Chromium, in which tests look at pages (Debian, as root).
	command -v chromium >/dev/null || { \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

lint: $(INSTALLED) ## Check style, format, types and import directions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

encoders: $(INSTALLED) ## Write ctune/encoders.json from the installed timm.
	$(BIN)/python -m ctune.make_encoders

docs: $(INSTALLED) ## Write the argument tables into docs/methods/*.md.
	$(BIN)/python -m tests.test_docs

clean: stop-demo ## Remove what this Makefile made: .venv, the demo's data, caches.
	rm -rf $(VENV) $(DEMO_DATA) build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
