# `make demo` and `make test` need Python 3.11, make and the package registries; nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

install: $(VENV)/.installed .ci/.system

demo: install
	$(BIN)/vlm-reward demo

test: install lint
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c .ci/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --progress-bar off -c .ci/constraints.txt -e ".[dev]"
	touch $@

# Headless rendering needs EGL or OSMesa of the system. Where one works nothing is installed.
.ci/.system: .ci/system $(VENV)/.installed
	sh .ci/system $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) .ci/.system *.egg-info
