# make demo [DATA=folder] [OUT=folder]   make test   make test-all   make docs   make notebooks   make format   make clean
PYTHON ?= python3
OUT ?= demo
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo check test test-all docs notebooks format clean

help:
	@echo "make demo            train the baseline and ConResNet on phantoms, compare them (results in $(OUT)/)"
	@echo "make demo DATA=dir   the same on a data set in Medical Segmentation Decathlon layout"
	@echo "make test            format, lint, spelling, types, documentation, tests"
	@echo "make test-all        the same and the slow tests"
	@echo "make docs            documentation into docs/_build/html"
	@echo "make notebooks       execute the notebooks of examples/, outputs stored in place"
	@echo "make format          correct what the format and lint checks would find"
	@echo "make clean           remove what the other targets made"

demo: $(VENV)/.examples
	$(RUN) examples/quickstart.py --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: check
	$(RUN) -m pytest

test-all: check
	$(RUN) -m pytest -m ""

check: $(VENV)/.test docs
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m codespell_lib
	$(RUN) -m mypy

docs: $(VENV)/.test
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

notebooks: $(VENV)/.test
	$(RUN) examples/execute_notebooks.py

format: $(VENV)/.test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) demo docs/_build build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The environment is complete when its mark file is there. Without the file it is built again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.10 or newer, got %d.%d; try make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.examples $(VENV)/.test: $(VENV)/.%: $(VENV)/.python setup.cfg pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	$(if $(filter test,$*),$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps dynamic-network-architectures==0.4.4)
	touch $@
