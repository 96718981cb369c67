# `make demo` and `make test` each set a fresh machine up: Python 3.10-3.13, pip and make are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SEEDS ?= 0

.PHONY: help demo test test-slow reliability style
help:
	@echo "make demo       set up, then run everything on a small synthetic cohort (SEEDS=\"0 1 2\" for several)"
	@echo "make test       set up, then run style checks and the default tests"
	@echo "make test-slow  the tests that take long"
	@echo "make reliability  kills, full disks, damaged and hostile files, in large numbers; an hour or two"
	@echo "make style      format the code"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

demo: $(VENV)/installed
	$(BIN)/dre-slcl demo --seeds $(SEEDS)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --durations=10

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow -n 2 --durations=10

# The default counts: make reliability COUNTS=default
COUNTS ?= large
reliability: $(VENV)/installed
	$(BIN)/python -m tests.reliability.run_all --counts $(COUNTS)

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
