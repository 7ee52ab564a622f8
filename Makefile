# A fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test check settings bench-step bench-round bench-pool clean

run: $(STAMP)
	$(BIN)/pfedmoap run

test: check
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

settings: $(STAMP)
	$(BIN)/python -m pfedmoap_flwr.config

bench-step bench-round bench-pool: bench-%: $(STAMP)
	$(BIN)/python -m benchmarks.$*

clean:
	rm -rf .venv

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
