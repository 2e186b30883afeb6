# `make train` and `make test` need nothing but python3 (3.11 or later), make and the package index.
PYTHON ?= python3
PROCESSES ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.installed
TESTS := $(VENV)/.installed-for-tests
SHELL_FILES := $(wildcard .ci/run launch/*.sh slurm/*.sh slurm/*.sbatch)

.PHONY: help train test lint check soak bench docs clean

help: ## Print this list.
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 14

train: $(RUNS) ## Train on the embedded digits, 2 processes; PROCESSES=4 ARGS="--epochs=5" change that.
	PYTHON=$(BIN)/python launch/local.sh --nproc $(PROCESSES) $(ARGS)

test: $(TESTS) ## Run the tests; fails below 95 % coverage. ARGS="tests/test_plan.py --no-cov" for some.
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --cov=ddp_sgd $(ARGS)

lint: $(TESTS) ## Check style, types, imports, shell scripts, spelling and dependencies.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/shfmt -d -i 4 $(SHELL_FILES)
	$(BIN)/codespell
	$(BIN)/deptry .

check: lint test ## All that CI runs.

soak: $(TESTS) ## A hundred random faults, 20 restarts, machines that come and go: half an hour. ARGS="--faults=20 --seed=1".
	$(BIN)/python -m benchmarks.soak $(ARGS)
	RESTARTS=20 $(BIN)/python -m pytest tests/test_restarts.py tests/test_early_stops.py -s --timeout 900

bench: $(TESTS) ## The same training by ddp_sgd, by hand and by other frameworks: half an hour. ARGS="--workloads mlp --rounds 3".
	$(BIN)/python -m benchmarks.peers --write benchmarks/results $(ARGS)

docs: $(RUNS) ## Write docs/configuration.md anew.
	$(BIN)/python -c 'from ddp_sgd.config.reference import reference_markdown as m; print(m(), end="")' \
		>docs/configuration.md

clean: ## Remove what tools leave behind; runs/ and .venv/ stay.
	rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# PIP_CONSTRAINT, not -c: it takes the place of a constraint in the user's pip configuration, which
# may cap a version that is pinned here.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check

$(RUNS): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ddp_sgd into $(VENV); the first time this fetches PyTorch, a few GB"
	@$(INSTALL) --editable .
	@touch $@

$(TESTS): $(RUNS)
	@echo "installing the tools for tests into $(VENV)"
	@$(INSTALL) --editable '.[dev,bench]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"$(PYTHON) is missing or older than 3.11; install a newer one, or name it: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
