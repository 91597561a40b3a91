# Every target builds the environment it needs. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test test-system format lint typecheck report bench-tinyllama clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: dense model in, measured Pareto front out (12 minutes on 2 cores, cached afterwards)
	$(BIN)/moesaic -m experiment=demo method=dense,dense_same_tokens,static_slice,moefication,factorllm paths.runs=$(RUNS)
	$(BIN)/moesaic-report $(RUNS)

test: $(READY)  ## all tests that need nothing but this environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not system" -n logical --maxprocesses 4 --dist loadfile

test-system: $(READY)  ## tests that start other programs: browser, killed and concurrent runs
	tests/system/install.sh
	$(BIN)/python -m pytest -m system

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff format src tests analysis
	$(BIN)/ruff check --fix-only --quiet src tests analysis

lint: $(READY)  ## check format and style
	$(BIN)/ruff format --check src tests analysis
	$(BIN)/ruff check src tests analysis

typecheck: $(READY)  ## check types
	$(BIN)/mypy

report: $(READY)  ## rebuild tables, report.html and pictures from the records in RUNS
	$(BIN)/moesaic-report $(RUNS)

bench-tinyllama: $(READY)  ## measured and ideal speed on a random-weight TinyLlama-1.1B shape
	$(BIN)/python analysis/bench/tinyllama_shape.py

clean:  ## remove the environment and all runs
	rm -rf $(VENV) $(RUNS)
