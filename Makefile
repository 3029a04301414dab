# `make reproduce` runs the main job on the embedded defaults; `make test` passes the tests. Each makes .venv on first use.
# The first Python here that is new enough; make PYTHON=/path/to/python takes another.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do $$p $(NEW_ENOUGH) && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The compilers for TPUs and GPUs have an environment of their own: where libtpu is installed, every run on a CPU begins with
# its errors.
TPU := .venv-tpu
# The newest stack that is tested has one too. pyenv's python3.12 answers only where 3.12 is among its chosen versions, and
# where its shims are on the path; its folder is looked into otherwise.
NEWEST := .venv-newest
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHON312 ?= $(firstword $(shell PYENV_VERSION=3.12 python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null) $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python3.12))
# Python 3.11 takes no jax after 0.10.2; the other versions share the newest.
PINS = $$($(1)/python -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-newest.txt")')
INSTALL = $(1)/pip install -q --disable-pip-version-check -c "$(call PINS,$(1))" -e
PINNED := tpu preflight peers notebooks tensorboard wandb dev
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/jax_cache

.PHONY: help reproduce test test-fast test-newest test-peers test-aot test-fuzz check lint format types boundaries bench bench-gpu notebooks tables preflight constraints clean same-python

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

reproduce: $(VENV)/base  ## the three papers' effects on embedded data: tables, and pictures in runs/reproduce
	$(BIN)/python -m experiments.reproduce

EXTRA_NEEDED := peers or aot or fuzz
# Some tests wait for other processes: three workers keep two cores busy.
test: $(VENV)/dev  ## all tests that need no torch
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations=12 -m "not ($(EXTRA_NEEDED))"

test-fast: $(VENV)/dev  ## the tests that take a second, in less than three minutes
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not (slow or multiproc or $(EXTRA_NEEDED))"

test-newest:  ## the fast tests on Python 3.12 with the newest jax (PYTHON312=/path/to/it)
	@"$(PYTHON312)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { echo "error: no Python 3.12 here. Install one (its venv module too), or name it: make $@ PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(MAKE) PYTHON="$(PYTHON312)" VENV=$(NEWEST) test-fast

test-peers: $(VENV)/peers  ## parity with live peers (torch, transformers)
	$(BIN)/python -m pytest -n 2 -m peers

test-aot: $(TPU)/ready  ## compile for TPUs and GPUs, without hardware
	$(TPU)/bin/python -m pytest -m aot

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
	$(BIN)/pyright --pythonpath $(BIN)/python  # with the libraries that are installed there

boundaries: $(VENV)/dev
	$(BIN)/lint-imports

bench: $(VENV)/peers  ## our I-JEPA step, sink decoding and metaopt overhead against PyTorch, transformers and optax
	$(BIN)/python -m experiments.jepa.bench
	$(BIN)/python -m experiments.sinks.bench
	$(BIN)/python -m experiments.metaopt.bench

bench-gpu: $(VENV)/gpu  ## the same and more on an NVIDIA GPU, three parts of at most 8 minutes (ARGS=--minutes=5)
	for p in sinks jepa metaopt; do $(BIN)/python -m experiments.$$p.bench_gpu $(ARGS) || exit 1; done

notebooks: $(VENV)/notebooks  ## run the notebooks: one page a paper in runs/notebooks
	@mkdir -p runs/notebooks
	for p in $(patsubst experiments/%/notebook.ipynb,%,$(wildcard experiments/*/notebook.ipynb)); do $(BIN)/jupyter nbconvert --to html --execute --output-dir $(CURDIR)/runs/notebooks --output $$p experiments/$$p/notebook.ipynb || exit 1; done

tables: $(VENV)/base  ## write docs/results/tables.md and coverage.md from the committed rows
	$(BIN)/python -m experiments.tables

preflight: $(TPU)/ready  ## compile the released recipes for v5e:16x16 that the committed table lacks
	$(TPU)/bin/python -m experiments.preflight --all --missing --topology=v5e:16x16

define venv
	@"$(PYTHON)" $(NEW_ENOUGH) || { echo "error: no Python 3.11 or newer: '$(PYTHON)' is none. Install one (its venv module too), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(1)
endef

# An environment keeps its Python: another one that is asked for would go unused without a word.
same-python: | $(VENV)/bin/pip
ifneq ($(origin PYTHON),file)
	@v='import sys; print("Python %d.%d" % sys.version_info[:2])'; has=$$($(BIN)/python -c "$$v"); wanted=$$("$(PYTHON)" -c "$$v" || echo "$(PYTHON)"); \
	[ "$$has" = "$$wanted" ] || { echo "error: $(VENV) holds $$has, not $$wanted: name another environment (VENV=.venv-other), or 'make clean' first" >&2; exit 1; }
endif

$(VENV)/bin/pip:
	$(call venv,$(VENV))

$(VENV)/base: pyproject.toml constraints.txt constraints-newest.txt | $(VENV)/bin/pip same-python
	@echo "installing (about a minute on first use)"
	$(call INSTALL,$(BIN)) .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(call INSTALL,$(BIN)) ".[dev]"
	@touch $@

$(VENV)/peers: $(VENV)/dev
	$(call INSTALL,$(BIN)) ".[peers]"
	@touch $@

$(VENV)/gpu: $(VENV)/peers
	$(call INSTALL,$(BIN)) ".[cuda]"
	@touch $@

$(VENV)/notebooks: $(VENV)/base
	$(call INSTALL,$(BIN)) ".[notebooks]"
	@touch $@

$(TPU)/bin/pip:
	$(call venv,$(TPU))

$(TPU)/ready: pyproject.toml constraints.txt constraints-newest.txt | $(TPU)/bin/pip
	@echo "installing into $(TPU) (about a minute on first use)"
	$(call INSTALL,$(TPU)/bin) ".[dev,preflight]"
	@touch $@

# The nvidia packages stay out: jax's plugins and torch each name those that they were built with.
constraints: $(VENV)/bin/pip  ## write both files of pinned versions (UV=--upgrade takes the newest of everything)
	$(BIN)/pip install -q uv
	@for end in 3.11=constraints.txt 3.12=constraints-newest.txt; do \
	  $(BIN)/uv pip compile -q pyproject.toml $(PINNED:%=--extra %) --python-version $${end%=*} --no-annotate --custom-compile-command "make constraints" $(UV) -o $${end#*=} && \
	  grep -vE '^(nvidia|cuda|triton)' $${end#*=} >$${end#*=}.new && mv $${end#*=}.new $${end#*=} || exit 1; done

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(TPU) $(NEWEST) .pytest_cache .ruff_cache *.egg-info
