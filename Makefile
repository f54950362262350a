# Everything runs in .venv, which `make install` creates with every extra and the tools of development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE_TESTS := tests/model tests/processing tests/data tests/train tests/inference tests/test_house.py

.PHONY: help install quickstart test test-core coverage check bench wheel clean

help:
	@echo "make quickstart   train a small InternVL2.5 on real data, evaluate it, write a report (minutes)"
	@echo "make test         lint, types, import layers and all tests"
	@echo "make coverage     all tests, slower, with the share of lines that they run"
	@echo "make test-core    the quick ring: the core's own tests, between two edits"
	@echo "make bench        speed and memory beside transformers, llama.cpp and OpenVINO (an hour)"
	@echo "make install      set up $(VENV) with everything (the others do it when needed)"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ivl needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python -m examples.quickstart

test: install check
	$(BIN)/python -m pytest

coverage: install
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=90

test-core: install
	$(BIN)/python -m pytest $(CORE_TESTS) -m "not slow"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright --project pyright-core.json
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.against_transformers
	$(BIN)/python -m benchmarks.against_peers
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.startup

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) .venv-peers build dist runs .pytest_cache .ruff_cache .hypothesis
