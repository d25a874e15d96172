# make demo    train, evaluate and deploy in small, after setting up
# make test    linters, type checker and the test suite
# make bench   speeds of simulator, env, trainer and decisions
# make lint    linters and type checker alone
# make clean   remove what the tools left (the virtual environment stays; `rm -rf .venv` starts afresh)
#
# Every step of the set-up is a stamp file in .venv, made again only when what it depends on changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test bench lint clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
ROOMS := envs baselines agents real_backend experiments

# One thread a process: on a shared machine more threads wait for each other.
export OMP_NUM_THREADS := 1

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.installed
	$(BIN)/python -m schedlab.experiments.demo

bench: $(VENV)/.installed
	$(BIN)/schedlab bench

test: lint
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed $(VENV)/.typing
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy --no-error-summary

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@for python in python3.11 python3.12 python3.13 python3.14 python3; do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			echo "making $(VENV) with $$($$python --version)"; \
			$$python -m venv $(VENV); \
			touch $@; \
			exit 0; \
		fi; \
	done; \
	echo "error: no Python 3.11 or later with venv found. Install one (Debian: apt install python3.11-venv)" >&2; \
	exit 1

# torch first and by itself: resolved together with the rest it may be taken from an index with CUDA wheels.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.torch
	$(PIP) -e '.[exact,test]'
	@touch $@

# The package is called schedlab whatever this folder is called; mypy finds modules by path, so it gets a path.
$(VENV)/.typing: pyproject.toml | $(VENV)/.created
	@mkdir -p $(VENV)/typing/schedlab
	@for room in __init__.py $(ROOMS); do ln -sfn "../../../$$room" "$(VENV)/typing/schedlab/$$room"; done
	@touch $@
