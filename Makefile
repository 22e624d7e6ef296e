# Two commands do everything on a machine that has Python 3.11+ and make:
#   make quickstart   installs into .venv and trains in the sandbox
#   make test         installs with the development tools and runs the tests

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Workers for the tests; two cores is the smallest machine we promise times for.
JOBS   ?= 2

.PHONY: quickstart test test-all check docs clean

$(VENV)/.train: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[train]"
	@touch $@

$(VENV)/.dev: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(VENV)/.train

quickstart: $(VENV)/.train
	$(BIN)/prefopt train quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m prefopt_losses.readme losses/README.md
	$(BIN)/python -m prefopt.recipe.document docs
	$(BIN)/python -m prefopt.cli.loss_pages docs/losses

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
