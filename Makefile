# make setup   an environment with everything, for this machine (CPU or NVIDIA)
# make demo    the whole job on a small corpus, from teacher to report
# make test    every test
# make test-gpu  what only a GPU can show: targets, losses, engine and whole runs on one
# make bench   benchmarks against plain alternatives; results in docs/benchmarks/ (*-gpu.csv where there is a GPU)
# make chaos   half an hour of random kills of workers, driver and nodes: the store must come out the same
# make lint    ruff, types, shell
#
# PYTHON=python3.12 chooses the interpreter, TORCH_INDEX=URL where CPU wheels of PyTorch come from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test test-gpu bench chaos lint clean
INPUTS := pyproject.toml docker/install.sh

setup: $(VENV)/.all

# The demo needs no vLLM and no test tools; a minute of installing is saved.
$(VENV)/.demo: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "decant needs Python 3.11 or 3.12, and $(PYTHON) is another: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python bash docker/install.sh cache train report
	touch $@

$(VENV)/.all: $(VENV)/.demo
	PYTHON=$(BIN)/python bash docker/install.sh cache vllm train report dev
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python configs/demo/run.py

test: $(VENV)/.all
	$(BIN)/python -m pytest

test-gpu: $(VENV)/.all
	$(BIN)/python -m pytest tests/gpu

bench: $(VENV)/.all
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.loss
	$(BIN)/python -m tests.bench.store
	$(BIN)/python -m tests.bench.teacher
	$(BIN)/python -m tests.bench.job
	$(BIN)/python -m tests.bench.vllm
	$(BIN)/python -m tests.bench.schedule
	$(BIN)/python -m tests.bench.step

chaos: $(VENV)/.all
	$(BIN)/python -m tests.chaos --minutes 30

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck docker/install.sh .ci/run
	$(BIN)/hadolint docker/*.Dockerfile

clean:
	rm -rf $(VENV) runs
