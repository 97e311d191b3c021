# Each target sets itself up: the first one builds .venv, later ones reuse it until setup.cfg changes.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The interpreter that runs the tools, and what has to be in place before it does.
RUN ?= $(BIN)/python
READY ?= $(VENV)/.installed-all
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet install
TREE = .typecheck/sparselearn

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest check lint types format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.installed-demo ## train digits dense, static and RigL side by side, and print a table
	@echo "demo: training the digits recipe three times into runs/demo"
	@$(BIN)/sparselearn sweep digits variant=dense,static,rigl --out runs/demo

test: check ## lint, types and the test suite; any warning is an error
	@echo "test: pytest"
	@$(RUN) -m pytest

test-slow: $(READY) ## the tests that take minutes or the network (building and installing the wheel, ...)
	@$(RUN) -m pytest -m slow

# numpy: triton 3.6's interpreter does not run with 2.4.
test-oldest: ## the suite with the oldest torch that setup.cfg allows, in .venv-oldest (PYTHON=python3.11 for all of it)
	@$(MAKE) --no-print-directory VENV=.venv-oldest .venv-oldest/bin/python
	@.venv-oldest/bin/python -m pip --disable-pip-version-check --quiet install -e '.[all]' \
		torch==2.11.0 torchvision==0.26.0 'numpy<2.4'
	@.venv-oldest/bin/python -m pytest

check: lint types ## ruff and mypy

lint: $(READY) ## ruff: rules and formatting
	@echo "check: ruff"
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check . || \
		{ echo "Some files are not formatted: run 'make format'."; exit 1; }

# mypy does not know setup.cfg's package_dir: given the folders it reads kernels/ as a package of its own,
# or not at all. So it gets the installed layout, made of links.
types: $(READY) ## mypy (strict) over every file of sparselearn/, kernels/ and recipes/
	@echo "check: mypy"
	@mkdir -p $(TREE)
	@for path in sparselearn/* kernels recipes; do ln -sfn "../../$$path" $(TREE)/; done
	@for link in $(TREE)/*; do [ -e "$$link" ] || rm -f "$$link"; done
	@run="$(RUN)"; case "$$run" in /*) ;; */*) run="../$$run" ;; esac; \
		cd .typecheck && "$$run" -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p sparselearn

format: $(READY) ## let ruff fix and format the files
	@$(RUN) -m ruff check --quiet --fix .
	@$(RUN) -m ruff format --quiet .

clean: ## remove caches and build folders (keeps .venv and runs)
	rm -rf build dist .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis sparselearn.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "sparselearn needs Python 3.11 to 3.13; $(PYTHON) is not. Try: make PYTHON=python3.12"; exit 1; }
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-all: setup.cfg | $(BIN)/python
	@echo "setup: installing sparselearn and its tools (the first time: some minutes, about 3 GB)"
	@$(PIP) -e '.[all]'
	@touch $(VENV)/.installed-demo $@
	@echo "setup: done"

$(VENV)/.installed-demo: setup.cfg | $(BIN)/python
	@echo "setup: installing sparselearn for the recipes (the first time: some minutes, about 3 GB)"
	@$(PIP) -e '.[recipes,lightning]'
	@touch $@
	@echo "setup: done"
