# The project's words. `make demo` and `make test` set up everything they need.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint fix bench bench-canonical docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Errata needs Python 3.11 or newer; make PYTHON=python3.12 ... names another one.")'
	@echo "Setting up .venv (torch is large: this takes a minute or two the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/errata demo --out out/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/cog --check docs/reference.md

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/cog -r docs/reference.md

# BENCH holds extra arguments, e.g. make bench BENCH="--quick --data ../shared/data"
bench: setup
	$(BIN)/python bench/run.py $(BENCH)

# the protocol of canonical examples on the lab: hours on two cores, goes on where it was interrupted
bench-canonical: setup
	$(BIN)/python bench/canonical_lab.py $(BENCH)

clean:
	rm -rf .venv out build dist
