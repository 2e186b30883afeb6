# `make train` and `make test` need nothing but python3 (3.11 or later), make and the package index.
PYTHON ?= python3
PROCESSES ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.installed
TESTS := $(VENV)/.installed-for-tests
LOWEST := .venv-lowest
NEWER := .venv-newer
SHELL_FILES := $(wildcard .ci/run launch/*.sh slurm/*.sh slurm/*.sbatch)

.PHONY: help train test test-fast test-gpu lint lowest newer check soak bench docs clean

help: ## Print this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 14

train: $(RUNS) ## Train on the embedded digits, 2 processes; PROCESSES=4 ARGS="--epochs=5" change that.
	PYTHON=$(BIN)/python launch/local.sh --nproc $(PROCESSES) $(ARGS)

test: $(TESTS) ## Run the tests; fails below 95 % coverage. ARGS="tests/test_plan.py --no-cov" for some.
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --cov=ddp_sgd $(ARGS)

test-fast: $(TESTS) ## Run the unit tests and a few runs, in less than two minutes.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --no-cov --fast $(ARGS)

test-gpu: $(TESTS) ## Run the tests that need a GPU.
	$(BIN)/python -m pytest -n 4 --no-cov tests/gpu $(ARGS)

lint: $(TESTS) ## Check style, types, imports, shell scripts, spelling and dependencies.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/shfmt -d -i 4 $(SHELL_FILES)
	$(BIN)/codespell
	$(BIN)/deptry .

lowest: $(LOWEST)/.installed ## Run some tests with the lowest versions that pyproject.toml promises, but for torch.
	$(LOWEST)/bin/python tests/lowest_versions.py --check
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(LOWEST_TESTS) $(ARGS)

newer: $(NEWER)/.installed ## Run the tests that need no torch; PYTHON=python3.13 names a newer interpreter.
	PYTHONPATH=$(CURDIR) $(NEWER)/bin/python -m pytest $(NEWER_TESTS) $(ARGS)

check: lint test lowest ## All that CI runs.

soak: $(TESTS) ## A hundred random faults, 20 restarts, machines that come and go: half an hour. ARGS="--faults=20 --seed=1".
	$(BIN)/python -m benchmarks.soak $(ARGS)
	RESTARTS=20 $(BIN)/python -m pytest tests/test_restarts.py tests/test_early_stops.py -s --timeout 900

bench: $(TESTS) ## The headline table: ddp_sgd beside frameworks and loops by hand, half an hour. ARGS="--rounds 1" for a third of it.
	$(BIN)/python -m benchmarks.peers --write benchmarks/results $(ARGS)

docs: $(RUNS) ## Write the tables of docs/configuration.md again.
	$(BIN)/python -c 'from pathlib import Path; from ddp_sgd.config.keys import reference_markdown; \
		page = Path("docs/configuration.md"); page.write_text(reference_markdown(page.read_text()))'

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

# What takes long with the pinned versions is left out: these are to touch every package once.
LOWEST_TESTS := tests/config tests/data tests/test_instantiate.py tests/test_models.py \
	tests/test_plan.py tests/test_platforms.py tests/report/test_journal.py tests/report/test_tensorboard.py \
	tests/report/test_run_folder.py tests/checkpointing/test_exporting.py \
	tests/report/test_wandb_logger.py::test_the_configuration_the_plan_the_commit_and_the_world_size_are_recorded

# torch, torchvision and what has no promise are found behind the packages of this environment.
$(LOWEST)/.installed: $(TESTS) tests/lowest_versions.py
	@echo "installing the lowest versions into $(LOWEST)"
	@rm -rf $(LOWEST)
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(LOWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	@$(BIN)/python tests/lowest_versions.py >$(LOWEST)/constraints.txt
	@PIP_CONSTRAINT=$(LOWEST)/constraints.txt $(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check \
		--editable '.[test]'
	@touch $@

# Of the torch-free part of the package: what its tests import, too, needs no torch.
NEWER_TESTS := tests/config --ignore=tests/config/test_reference.py tests/test_plan.py \
	tests/test_scaling.py tests/test_explain.py --deselect=tests/test_explain.py::test_the_model_gives_the_size_of_its_gradients \
	--deselect=tests/test_explain.py::test_a_model_that_is_frozen_has_no_gradients \
	--deselect=tests/test_explain.py::test_an_order_is_evaluated_for_the_batch_of_the_plan \
	--deselect=tests/test_explain.py::test_an_order_that_fails_is_one_line \
	--deselect=tests/report/test_plan_table.py::test_what_a_schedule_has_beside_its_name tests/test_requeue.py tests/distributed/test_slurm_environment.py \
	tests/test_slurm_job.py tests/distributed/test_gpus.py tests/launch/test_options.py tests/test_run_files.py \
	tests/test_time_limits.py tests/test_cli.py tests/checkpointing/test_retrying.py \
	tests/test_text.py tests/test_rank_differences.py tests/report/test_curve.py \
	tests/report/test_failures.py tests/report/test_journal.py tests/report/test_lost_result.py tests/report/test_plan_table.py \
	tests/test_scaling_table.py tests/report/test_git_commit.py \
	tests/engine/test_timetable.py tests/distributed/test_hang_report.py tests/data/test_digits.py

$(NEWER)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo \
		"$(PYTHON) is missing or older than 3.12; name a newer one: make newer PYTHON=python3.13" >&2; exit 1; }
	@echo "installing what needs no torch into $(NEWER)"
	@rm -rf $(NEWER)
	@$(PYTHON) -m venv $(NEWER)
	@PIP_CONSTRAINT=constraints.txt $(NEWER)/bin/python -m pip install -qq --disable-pip-version-check \
		numpy pyyaml pydantic tqdm pytest pytest-timeout hypothesis
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"$(PYTHON) is missing or older than 3.11; install a newer one, or name it: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
