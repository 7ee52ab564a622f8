# A fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
# The versions that were tested; `make LOCK= test` takes the newest that pyproject.toml allows.
LOCK ?= requirements/lock.txt
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test test-quick check settings methods lock bench-step bench-round bench-pool bench-methods clean

run: $(STAMP)
	$(BIN)/pfedmoap run

# Tests that start Flower's processes run by themselves: beside others they would wait for a core.
test: check
	$(BIN)/python -m pytest -n $(WORKERS) -m "not processes"
	$(BIN)/python -m pytest -m processes

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not processes"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

settings: $(STAMP)
	$(BIN)/python -m pfedmoap_flwr.config

methods: $(STAMP)
	$(BIN)/python scripts/methods_page.py

lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --no-annotate --upgrade --output-file requirements/lock.txt

bench-step bench-round bench-pool bench-methods: bench-%: $(STAMP)
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf .venv

$(STAMP): pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) --editable ".[dev]"
	touch $@
