# A fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
# The versions that were tested; `make LOCK= test` takes the newest that pyproject.toml allows.
LOCK ?= requirements/lock.txt
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test test-deploy test-quick check docs docs-serve settings methods lock bench-step bench-round bench-pool bench-methods bench-attacks clean

run: $(STAMP)
	$(BIN)/pfedmoap run

test: check
	$(BIN)/python -m pytest -n $(WORKERS) -m "not processes"

# Tests that start Flower's processes run by themselves: beside others they would wait for a core.
# They mostly wait for Flower, which asks every 3 s whether there is anything new: so two files at once.
test-deploy: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m processes

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not processes"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir .venv/site

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

settings: $(STAMP)
	$(BIN)/python -m pfedmoap_flwr.config

methods: $(STAMP)
	$(BIN)/python scripts/methods_page.py

# Without the trackers: what one of them needs would hold back what all others use.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra scripts --universal --no-annotate --upgrade --output-file requirements/lock.txt

bench-step bench-round bench-pool bench-methods bench-attacks: bench-%: $(STAMP)
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf .venv

$(STAMP): pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK)) --editable ".[dev]"
	touch $@
