# `make reproduce` runs the main job on the embedded defaults; `make test` passes the tests. Each makes .venv on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/jax_cache

.PHONY: help reproduce test test-fast test-peers test-fuzz check lint format types boundaries bench notebooks tables preflight clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

reproduce: $(VENV)/base  ## the three papers' effects on embedded data: tables, and pictures in runs/reproduce
	$(BIN)/python -m experiments.reproduce

test: $(VENV)/dev  ## all tests that need no torch
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=12 -m "not peers and not aot and not fuzz"

test-fast: $(VENV)/dev  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not multiproc and not peers and not aot and not fuzz"

test-peers: $(VENV)/peers  ## parity with live peers (torch, transformers)
	$(BIN)/python -m pytest -n 2 -m peers

test-aot: $(VENV)/tpu  ## compile the released recipes for a TPU pod, without hardware
	$(BIN)/python -m pytest -m aot

test-fuzz: $(VENV)/dev  ## damaged weight files by the hundred (FUZZ_SEEDS=5,6 for other ones)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fuzz

check: lint types boundaries  ## lint, types, import rules

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev
	$(BIN)/pyright

boundaries: $(VENV)/dev
	$(BIN)/lint-imports

bench: $(VENV)/peers  ## our I-JEPA step, sink decoding and metaopt overhead against PyTorch, transformers and optax
	$(BIN)/python -m experiments.bench.jepa_step
	$(BIN)/python -m experiments.bench.sinks_decode
	$(BIN)/python -m experiments.bench.metaopt_overhead

notebooks: $(VENV)/notebooks  ## run the notebooks: one page a paper in runs/notebooks
	@mkdir -p runs/notebooks
	$(BIN)/jupyter nbconvert --to html --execute --output-dir runs/notebooks experiments/notebooks/*.ipynb

tables: $(VENV)/base  ## write experiments/TABLES.md from the committed rows
	$(BIN)/python -m experiments.tables

preflight: $(VENV)/tpu  ## compile the released recipes for v5e:16x16 that the committed table lacks
	$(BIN)/python -m experiments.preflight --all --missing --topology=v5e:16x16

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)

$(VENV)/base: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "installing (about a minute on first use)"
	$(INSTALL) .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(INSTALL) ".[dev]"
	@touch $@

$(VENV)/peers: $(VENV)/dev
	$(INSTALL) ".[peers]"
	@touch $@

$(VENV)/notebooks: $(VENV)/base
	$(INSTALL) ".[notebooks]"
	@touch $@

$(VENV)/tpu: $(VENV)/dev
	$(INSTALL) ".[tpu]"
	@touch $@

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
