# Everything runs in .venv. `make quickstart` puts into it what the quickstart needs, `make install` every extra and the tools of
# development; the other targets do what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
CORE_TESTS := tests/model tests/processing tests/data tests/train tests/inference tests/test_house.py

.PHONY: help install quickstart test test-core coverage check claims bench gpu-check docs wheel clean

help:
	@echo "make quickstart   train a small InternVL2.5 on real data, evaluate it, write a report (minutes)"
	@echo "make test         lint, types, import layers and all tests"
	@echo "make coverage     all tests, slower, with the share of lines that they run"
	@echo "make test-core    the quick ring: the core's own tests, between two edits"
	@echo "make claims       try every claim of the paper in small (6 hours; QUICK=1 20 minutes), docs/claims.md"
	@echo "make bench        speed and memory beside transformers, llama.cpp and OpenVINO (an hour)"
	@echo "make gpu-check    what a card does here: correctness, kernels, speed, memory (at most ten minutes)"
	@echo "make docs         the pages of docs/ as a site, in site/"
	@echo "make install      set up $(VENV) with everything (the others do it when needed)"

install: $(VENV)/.installed

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("ivl needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing torch and what the quickstart needs into $(VENV): 1.3 GB, 48 packages; its data come with them."
	@echo "On Linux PyPI's torch also brings CUDA, gigabytes more; PIP_EXTRA_INDEX_URL with torch's index of CPU builds leaves it out."
	$(PIP) --editable '.[quickstart]'
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "Installing every extra and the tools of development into $(VENV): 3 GB, 190 packages. The quickstart needs less: make quickstart."
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.quickstart $@

quickstart: $(VENV)/.quickstart
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

claims: install
	$(if $(REAL),$(PIP) onnx)
	$(BIN)/python -m studies.claims $(if $(FRESH),--fresh) $(if $(QUICK),--quick) $(if $(REAL),--real) $(if $(ONLY),--only $(ONLY))

bench: install
	$(BIN)/python -m benchmarks.against_transformers
	$(BIN)/python -m benchmarks.against_peers
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.startup

docs: install
	$(BIN)/python docs/build.py

gpu-check: install
	$(BIN)/python -m benchmarks.gpu

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) .venv-peers build dist site runs .pytest_cache .ruff_cache .hypothesis
