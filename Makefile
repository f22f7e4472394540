# Each target works alone on a fresh clone: it makes the virtual environment, installs with the pinned versions, then works.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test quick lint types bench-operators bench-xray bench-kernels bench-fast-sums bench-solvers bench-autodiff clean

demo: $(VENV)/.imaging
	$(BIN)/pullback demo --out demo-output

test: lint types
	$(BIN)/python -m pytest -n 2

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

bench-operators: $(VENV)/.dev
	$(BIN)/python benchmarks/operators.py

bench-kernels: $(VENV)/.bench
	$(BIN)/python benchmarks/kernels.py $(if $(DEVICE),--device $(DEVICE))

bench-fast-sums: $(VENV)/.bench
	$(BIN)/python benchmarks/fast_sums.py

bench-autodiff: $(VENV)/.dev
	$(BIN)/python benchmarks/autodiff.py
	$(BIN)/python benchmarks/graphs.py

bench-solvers: $(VENV)/.bench
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/solver_overhead.py
	$(BIN)/python benchmarks/wavelet.py

bench-xray: $(VENV)/.bench
	$(BIN)/python benchmarks/xray.py $(if $(DEVICE),--device $(DEVICE))

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pullback needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.imaging: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[imaging]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) --editable '.[dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
